"""O-LoRA: one adapter per task, all of them summed, the new one orthogonal to the old."""

import pytest
import torch
from torch import nn

from mmcl.core import begin_task, forward, step, trainable_parameters
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.strategies import OLoRA
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    second_step,
    taught,
    trains_as_lora,
    trains_only_the_newest_adapter,
)
from tests.toys.toy_llava import a_dialogue_batch

SMALL = {"rank": 2, "overlap_weight": 10.0}


def make(**how):
    return lambda: OLoRA(**{**SMALL, **how})


def layers_of(model):
    return list(find_layers(model, MultiLoRALinear).values())


def test_a_layer_answers_with_all_pairs_added():
    model, _ = taught(*attached(make(alpha=6)), TASKS)
    for layer in layers_of(model):
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        for adapter in layer.adapters:
            assert adapter.lora_B.any()
            expected = expected + 3 * (x @ adapter.lora_A.T @ adapter.lora_B.T)
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("how", [{}, {"past_in_forward": False}, {"overlap": "squared"}])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_only_the_newest_adapter_is_trained():
    trains_only_the_newest_adapter(make)


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
        first, second, new = (adapter.lora_A.detach() for adapter in layer.adapters)
        entries = [
            abs(float(row @ other)) ** power
            for old in (first, second)
            for row in old
            for other in new
        ]
        means.append(sum(entries) / len(entries))
    assert float(term.detach()) == pytest.approx(10.0 * sum(means) / len(means), rel=1e-4)


def test_the_documented_weight_makes_the_released_codes_sum():
    model, _, done = second_step(make)
    ours, layers = done.terms["overlap"], layers_of(model)
    pairs = [(one.adapters[0].lora_A.detach(), one.adapters[1].lora_A.detach()) for one in layers]
    summed = sum(float((old @ new.T).abs().sum()) for old, new in pairs)
    theirs = 10.0 / (len(layers) * 2 * 2)
    assert float(ours.detach()) == pytest.approx(theirs * summed, rel=1e-4)


def test_a_strong_weight_makes_new_pairs_orthogonal():
    def left(weight):
        model, strategy = taught(
            *attached(make(overlap_weight=weight, overlap="squared")), TASKS[:2], 0.05
        )
        pairs = [
            (one.adapters[0].lora_A.detach(), one.adapters[1].lora_A.detach())
            for one in layers_of(model)
        ]
        return sum(float((old @ new.T).square().mean()) for old, new in pairs)

    assert left(200.0) < 0.3 * left(0.0)


def test_without_weights_there_is_no_term():
    assert set(second_step(make, overlap_weight=0.0)[2].terms) == {"task"}


def test_decay_is_the_mean_norm_of_the_newest_pair():
    model, strategy = taught(*attached(make(decay=0.5, overlap_weight=0.0)), TASKS[:1])
    term = step(model, strategy, a_dialogue_batch(model)).terms["decay"]
    sides = [
        (one.adapters[0].lora_A.detach(), one.adapters[0].lora_B.detach())
        for one in layers_of(model)
    ]
    norms = [sum(float(side.square().sum().sqrt()) for side in pair) for pair in sides]
    assert float(term.detach()) == pytest.approx(0.5 * sum(norms) / len(norms), rel=1e-5)


def test_a_zero_pair_has_a_finite_decay_gradient():
    model, strategy = attached(make(decay=0.5))
    begin_task(model, strategy, TASKS[0])
    step(model, strategy, a_dialogue_batch(model)).loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable_parameters(model).values())


def test_the_variant_trains_the_new_pair_alone_and_tests_them_all():
    model, strategy = taught(*attached(make(past_in_forward=False)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    batch = mixed(model)
    forward(model.train(), strategy, batch)
    assert {one.active for one in layers_of(model)} == {(1,)}
    forward(model.eval(), strategy, batch)
    assert {one.active for one in layers_of(model)} == {(0, 1)}


def test_the_first_task_is_lora():
    trains_as_lora(OLoRA(rank=3), lambda layer: layer.adapters[0].lora_A)
