"""O-LoRA: one pair for each task, all of them answering, the new one pushed off the old."""

import pytest
import torch
from torch import nn

from mmcl.core import Chain, begin_task, run, step, trainable
from mmcl.layers import LowRankSlots, installed
from mmcl.strategies import ExperienceReplay, LoRA, OLoRA
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

SMALL = {"rank": 2, "weight": 10.0}


def make(**how):
    return lambda: OLoRA(**{**SMALL, **how})


def layers_of(model):
    return list(installed(model, LowRankSlots).values())


def test_a_layer_answers_with_all_pairs_added():
    model, _ = taught(*attached(make(alpha=6)), TASKS)
    for layer in layers_of(model):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        for slot in layer.slots:
            assert slot.B.any()
            expected = expected + 3 * (x @ slot.A.T @ slot.B.T)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("how", [{}, {"past_in_forward": False}, {"overlap": "squared"}])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_pairs_come_with_the_tasks_and_only_the_newest_learns():
    model, strategy = attached(make())
    for task in TASKS:
        begin_task(model, strategy, task)
        assert {len(layer.slots) for layer in layers_of(model)} == {task.index + 1}
        assert {name.split(".slots.")[1][0] for name in trainable(model)} == {str(task.index)}


def test_a_new_task_begins_with_the_answers_of_the_last():
    model, strategy = taught(*attached(make()), TASKS[:2])
    batch = mixed(model)
    before = scores(model, strategy, batch)
    begin_task(model, strategy, TASKS[2])
    torch.testing.assert_close(scores(model, strategy, batch), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("measure", "power"), [("absolute", 1), ("squared", 2)])
def test_the_overlap_is_a_mean_over_layers_and_entries(measure, power):
    model, strategy = taught(*attached(make(overlap=measure)), TASKS[:2])
    begin_task(model, strategy, TASKS[2])
    term = step(model, strategy, a_dialogue_batch(model, task=2)).terms["overlap"]
    means = []
    for layer in layers_of(model):
        first, second, new = (slot.A.detach() for slot in layer.slots)
        entries = [
            abs(float(row @ other)) ** power
            for old in (first, second)
            for row in old
            for other in new
        ]
        means.append(sum(entries) / len(entries))
    assert float(term.detach()) == pytest.approx(10.0 * sum(means) / len(means), rel=1e-4)


def test_the_documented_weight_makes_the_released_codes_sum():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    ours = step(model, strategy, a_dialogue_batch(model, task=1)).terms["overlap"]
    layers = layers_of(model)
    pairs = [(one.slots[0].A.detach(), one.slots[1].A.detach()) for one in layers]
    summed = sum(float((old @ new.T).abs().sum()) for old, new in pairs)
    theirs = 10.0 / (len(layers) * 2 * 2)
    assert float(ours.detach()) == pytest.approx(theirs * summed, rel=1e-4)


def test_no_gradient_reaches_the_past():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    step(model, strategy, a_dialogue_batch(model, task=1)).loss.backward()
    for layer in layers_of(model):
        assert layer.slots[0].A.grad is None
        assert layer.slots[0].B.grad is None
        assert layer.slots[1].A.grad.any()


def test_a_strong_weight_makes_new_pairs_orthogonal():
    def left(weight):
        model, strategy = taught(*attached(make(weight=weight, overlap="squared")), TASKS[:2], 0.05)
        pairs = [(one.slots[0].A.detach(), one.slots[1].A.detach()) for one in layers_of(model)]
        return sum(float((old @ new.T).square().mean()) for old, new in pairs)

    assert left(200.0) < 0.3 * left(0.0)


def test_without_weights_there_is_no_term():
    model, strategy = taught(*attached(make(weight=0.0)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    assert set(step(model, strategy, a_dialogue_batch(model, task=1)).terms) == {"task"}


def test_decay_is_the_mean_norm_of_the_newest_pair():
    model, strategy = taught(*attached(make(decay=0.5, weight=0.0)), TASKS[:1])
    term = step(model, strategy, a_dialogue_batch(model)).terms["decay"]
    sides = [(one.slots[0].A.detach(), one.slots[0].B.detach()) for one in layers_of(model)]
    norms = [sum(float(side.square().sum().sqrt()) for side in pair) for pair in sides]
    assert float(term.detach()) == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)


def test_a_zero_pair_has_a_finite_decay_gradient():
    model, strategy = attached(make(decay=0.5))
    begin_task(model, strategy, TASKS[0])
    step(model, strategy, a_dialogue_batch(model)).loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


def test_the_variant_trains_the_new_pair_alone_and_tests_them_all():
    model, strategy = taught(*attached(make(past_in_forward=False)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    batch = mixed(model)
    run(model.train(), strategy, batch)
    assert {one.active for one in layers_of(model)} == {(1,)}
    run(model.eval(), strategy, batch)
    assert {one.active for one in layers_of(model)} == {(0, 1)}


def test_the_first_task_is_lora():
    ours = StandIn(), OLoRA(rank=3)
    theirs = StandIn(), LoRA(rank=3)
    ours[1].attach(ours[0])
    theirs[1].attach(theirs[0])
    with torch.no_grad():
        theirs[0].patch.lora_A["default"].weight.copy_(ours[0].patch.slots[0].A)
    learn(*ours, [a_task(0)])
    learn(*theirs, [a_task(0)])
    torch.testing.assert_close(ours[0](whole(0)).logits, theirs[0](whole(0)).logits)


def test_with_replay_only_the_newest_pair_learns():
    model = StandIn()
    chain = Chain([OLoRA(rank=2), ExperienceReplay(6)])
    chain.attach(model)
    learn(model, chain, [a_task(0), a_task(1)])
    assert set(trainable(model)) == {"patch.slots.1.A", "patch.slots.1.B"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"weight": -1.0}, "weight is -1.0"),
        ({"decay": -1.0}, "decay -1.0"),
        ({"overlap": "cubed"}, "overlap is 'cubed'"),
        ({"rank": 0}, "rank is 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_what_cannot_be_is_refused(how, said):
    with pytest.raises(ValueError, match=said):
        OLoRA(**how)


def test_a_model_without_linears_is_refused():
    with pytest.raises(TypeError, match=r"OLoRA needs model\.linears"):
        OLoRA().attach(nn.Linear(2, 2))
