"""RegLoRA: a pair for each task on top of all before, held back where those were large."""

import pytest
import torch
from torch import nn

from mmcl.core import Chain, begin_task, end_task, step, trainable
from mmcl.layers import LowRankSlots, installed
from mmcl.ops.positions import unpack_bits
from mmcl.strategies import ExperienceReplay, LoRA, RegLoRA
from tests.stand_in import StandIn, a_task
from tests.stand_in_llava import a_dialogue_batch
from tests.strategies.bare_loop import learn, whole
from tests.strategies.dialogue_lessons import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    taught,
)


def make(**how):
    return lambda: RegLoRA(**{"rank": 2, "weight": 10.0, "share": 0.1, **how})


def layers_of(model):
    return installed(model, LowRankSlots)


def marks_of(model, strategy):
    layers = layers_of(model)
    return {
        name: unpack_bits(bits, layers[name].in_features)
        for name, bits in strategy.marks.tensors.items()
    }


def test_what_every_strategy_of_this_track_promises():
    keeps_its_promises(make())


def test_the_past_is_merged_in_effect():
    """A model whose weights the past was added to answers alike, which is the paper's form."""
    model, strategy = taught(*attached(make(alpha=6)), TASKS[:2])
    batch = mixed(model)
    before = scores(model, strategy, batch)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for slot in layer.slots:
                layer.base.weight += 3 * slot.B @ slot.A
                slot.B.zero_()
    torch.testing.assert_close(scores(model, strategy, batch), before, rtol=1e-4, atol=1e-5)


def test_the_frozen_weights_and_their_fingerprint_stay_those_of_the_start():
    model, strategy = attached(make())
    before = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    taught(model, strategy, TASKS)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())


def test_a_task_marks_its_largest_entries():
    model, strategy = taught(*attached(make()), TASKS[:1])
    marks = marks_of(model, strategy)
    for name, layer in layers_of(model).items():
        product = (layer.slots[0].B @ layer.slots[0].A).detach().abs().flatten().tolist()
        order = sorted(range(len(product)), key=lambda place: -product[place])
        wanted = sorted(order[: round(0.1 * len(product))])
        assert marks[name].flatten().nonzero().flatten().tolist() == wanted


def test_marks_add_up_and_count_once():
    model, strategy = taught(*attached(make()), TASKS[:1])
    first = marks_of(model, strategy)
    end_task(model, strategy, TASKS[0], ())
    again = marks_of(model, strategy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    size = strategy.bytes_remembered()
    taught(model, strategy, TASKS[1:2])
    both = marks_of(model, strategy)
    assert all((both[name] >= first[name]).all() for name in first)
    assert any((both[name] > first[name]).any() for name in first)
    assert strategy.bytes_remembered() == size
    layers = layers_of(model).values()
    assert size == sum(one.out_features * -(-one.in_features // 8) for one in layers)


def test_the_term_is_the_mean_of_single_entries_without_the_scale():
    model, strategy = taught(*attached(make(alpha=6)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.slots[1].B.normal_(generator=torch.Generator().manual_seed(1))
    term = step(model, strategy, a_dialogue_batch(model, task=1)).terms["held"]
    means = []
    for name, layer in layers_of(model).items():
        A, B = layer.slots[1].A.detach(), layer.slots[1].B.detach()
        places = marks_of(model, strategy)[name].nonzero().tolist()
        entries = [abs(float(B[row] @ A[:, column])) for row, column in places]
        means.append(sum(entries) / len(entries))
    assert float(term.detach()) == pytest.approx(10.0 * sum(means) / len(means), rel=1e-4)


def test_a_strong_weight_keeps_marked_entries_small():
    def moved(weight):
        model, strategy = taught(*attached(make(weight=0.0)), TASKS[:1])
        strategy.weight = weight
        marks = marks_of(model, strategy)
        taught(model, strategy, TASKS[1:2])
        total = 0.0
        for name, layer in layers_of(model).items():
            product = (layer.slots[1].B @ layer.slots[1].A).detach()
            total += float(product[marks[name]].abs().mean())
        return total

    assert moved(1.0) < 0.8 * moved(0.0)


def test_the_first_task_has_no_term_and_is_lora():
    ours, theirs = (StandIn(), RegLoRA(rank=3)), (StandIn(), LoRA(rank=3))
    ours[1].attach(ours[0])
    theirs[1].attach(theirs[0])
    with torch.no_grad():
        theirs[0].patch.lora_A["default"].weight.copy_(ours[0].patch.slots[0].A)
    learn(*ours, [a_task(0)])
    learn(*theirs, [a_task(0)])
    torch.testing.assert_close(ours[0](whole(0)).logits, theirs[0](whole(0)).logits)


def test_no_gradient_reaches_the_past():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    step(model, strategy, a_dialogue_batch(model, task=1)).loss.backward()
    for layer in layers_of(model).values():
        assert layer.slots[0].A.grad is None
        assert layer.slots[1].B.grad.any()


def test_with_replay_only_the_newest_pair_learns():
    model = StandIn()
    chain = Chain([RegLoRA(rank=2), ExperienceReplay(6)])
    chain.attach(model)
    learn(model, chain, [a_task(0), a_task(1)])
    assert set(trainable(model)) == {"patch.slots.1.A", "patch.slots.1.B"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"share": 0.0}, "share 0.0"),
        ({"share": 1.5}, "share 1.5"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_what_cannot_be_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        RegLoRA(**how)


def test_a_model_without_linears_is_refused():
    with pytest.raises(TypeError, match=r"RegLoRA needs model\.linears"):
        RegLoRA().attach(nn.Linear(2, 2))
