"""RegLoRA: one adapter per task, all summed, regularized where older ones are large."""

import pytest
import torch

from mmcl.core import begin_task, end_task, step
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.ops.lora_penalties import unpack_bits
from mmcl.strategies import RegLoRA
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    taught,
    trains_as_lora,
    trains_only_the_newest_adapter,
)
from tests.toys.toy_llava import a_dialogue_batch


def make(**how):
    return lambda: RegLoRA(**{"rank": 2, "reg_weight": 10.0, "top_fraction": 0.1, **how})


def layers_of(model):
    return find_layers(model, MultiLoRALinear)


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
            for adapter in layer.adapters:
                layer.base.weight += 3 * adapter.lora_B @ adapter.lora_A
                adapter.lora_B.zero_()
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
        product = (
            (layer.adapters[0].lora_B @ layer.adapters[0].lora_A).detach().abs().flatten().tolist()
        )
        order = sorted(range(len(product)), key=lambda place: -product[place])
        wanted = sorted(order[: round(0.1 * len(product))])
        assert marks[name].flatten().nonzero().flatten().tolist() == wanted


def test_marks_add_up_and_count_once():
    model, strategy = taught(*attached(make()), TASKS[:1])
    first = marks_of(model, strategy)
    end_task(model, strategy, TASKS[0], ())
    again = marks_of(model, strategy)
    assert all(torch.equal(first[name], again[name]) for name in first)
    size = strategy.state_bytes()
    taught(model, strategy, TASKS[1:2])
    both = marks_of(model, strategy)
    assert all((both[name] >= first[name]).all() for name in first)
    assert any((both[name] > first[name]).any() for name in first)
    assert strategy.state_bytes() == size
    layers = layers_of(model).values()
    assert size == sum(one.out_features * -(-one.in_features // 8) for one in layers)


def test_the_term_is_the_mean_of_single_entries_without_the_scale():
    model, strategy = taught(*attached(make(alpha=6)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.adapters[1].lora_B.normal_(generator=torch.Generator().manual_seed(1))
    term = step(model, strategy, a_dialogue_batch(model, task=1)).terms["held"]
    means = []
    for name, layer in layers_of(model).items():
        A, B = layer.adapters[1].lora_A.detach(), layer.adapters[1].lora_B.detach()
        marked = marks_of(model, strategy)[name].nonzero().tolist()
        entries = [abs(float(B[row] @ A[:, column])) for row, column in marked]
        means.append(sum(entries) / len(entries))
    assert float(term.detach()) == pytest.approx(10.0 * sum(means) / len(means), rel=1e-4)


def test_a_strong_weight_keeps_marked_entries_small():
    def moved(weight):
        model, strategy = taught(*attached(make(reg_weight=0.0)), TASKS[:1])
        strategy.reg_weight = weight
        marks = marks_of(model, strategy)
        taught(model, strategy, TASKS[1:2])
        total = 0.0
        for name, layer in layers_of(model).items():
            product = (layer.adapters[1].lora_B @ layer.adapters[1].lora_A).detach()
            total += float(product[marks[name]].abs().mean())
        return total

    assert moved(1.0) < 0.8 * moved(0.0)


def test_the_first_task_has_no_term_and_is_lora():
    trains_as_lora(RegLoRA(rank=3), lambda layer: layer.adapters[0].lora_A)


def test_only_the_newest_adapter_is_trained():
    trains_only_the_newest_adapter(make)
