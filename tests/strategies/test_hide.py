"""HiDe: fused adapters below, softly chosen ones in the last layer."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import begin_task, end_task, forward, step, trainable_parameters
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.strategies import HiDe
from mmcl.strategies.hide import last_layers
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    steps_of,
    taught,
)
from tests.toys.toy_llava import a_dialogue_batch, dialogue_batches

WAYS = [{}, {"fuse": "released"}, {"gate_layers": "all", "image_weight": 0.0, "temperature": 0.05}]


def make(**how):
    return lambda: HiDe(**{"rank": 2, **how})


def two_layers(how=None, tasks=TASKS):
    """Learned with a language model of two layers."""
    return taught(*attached(make(**(how or {})), num_layers=2), tasks)


def by_number(model):
    """Layers of number 0, and of number 1."""
    layers = find_layers(model, MultiLoRALinear)
    return [[own for name, own in layers.items() if f".layers.{n}." in name] for n in (0, 1)]


def expected_weights(model, batch, tasks=3, image_weight=0.5, temperature=0.1):
    """Softmax over similarity to means, in loops."""
    means = {}
    for task in range(tasks):
        for modality in ("image", "text"):
            rows = [
                model.embed(own.take(torch.tensor([row])), modality)[0].double()
                for own in dialogue_batches(model, task)
                for row in range(len(own))
            ]
            means[modality, task] = sum(rows) / len(rows)
    weights = []
    for row in range(len(batch)):
        own = batch.take(torch.tensor([row]))
        similarity = torch.zeros(tasks, dtype=torch.float64)
        for modality, weight in (("image", image_weight), ("text", 1 - image_weight)):
            seen = model.embed(own, modality)[0].double()
            for task in range(tasks):
                mean = means[modality, task]
                similarity[task] += weight * (seen @ mean) / (seen.norm() * mean.norm())
        weights.append(torch.exp(similarity / temperature))
        weights[-1] = weights[-1] / weights[-1].sum()
    return torch.stack(weights)


@pytest.mark.parametrize("how", WAYS)
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_what_it_promises_holds_with_lower_layers_too():
    model, strategy = two_layers()
    batch, plain = mixed(model), None
    plain = scores(model, strategy, batch)
    with strategy.merged_adapters(model):
        assert [layer.can_merge for layer in by_number(model)[0]] == [True] * 7
        torch.testing.assert_close(scores(model, strategy, batch), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores(model, strategy, batch), plain)


def test_means_that_weigh_the_last_layer_are_those_of_every_sample():
    model, strategy = two_layers()
    batch = mixed(model)
    gates = strategy.prompts(model, batch).gates["hide"]
    torch.testing.assert_close(gates.double(), expected_weights(model, batch), rtol=0, atol=1e-5)


def test_lower_layers_add_products_and_the_last_weighs_them_for_each_sample():
    model, strategy = two_layers()
    batch = mixed(model)
    forward(model, strategy, batch)
    weights, (lower, last) = expected_weights(model, batch).float(), by_number(model)
    for layer in lower + last:
        x = torch.randn(8, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        for row in range(8):
            expected = base[row].clone()
            for task in range(3):
                adapter = layer.adapter(task)
                weight = float(weights[row, task]) if layer in last else 1.0
                expected += 2 * weight * (x[row] @ adapter.lora_A.T @ adapter.lora_B.T)
            torch.testing.assert_close(layer(x)[row], expected, rtol=1e-4, atol=1e-4)


def test_the_released_fusion_multiplies_the_sums():
    model, strategy = two_layers({"fuse": "released"})
    forward(model, strategy, mixed(model))
    layer = by_number(model)[0][0]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    A, B = (sum(getattr(adapter, f"lora_{side}") for adapter in layer.adapters) for side in "AB")
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias) + 2 * (x @ A.T @ B.T)
    torch.testing.assert_close(layer(x), expected)


def test_all_layers_can_be_gated():
    model, strategy = two_layers(WAYS[2])
    batch = mixed(model)
    forward(model, strategy, batch)
    assert {layer.mode for layers in by_number(model) for layer in layers} == {"gates"}
    expected = expected_weights(model, batch, image_weight=0.0, temperature=0.05)
    torch.testing.assert_close(
        strategy.prompts(model, batch).gates["hide"].double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("how", WAYS)
def test_after_one_task_inference_is_the_forward_pass_of_training(how):
    model, strategy = two_layers(how, TASKS[:1])
    batch = mixed(model)
    evaluated = scores(model, strategy, batch)
    learned = forward(model, strategy.train(), batch).logits
    torch.testing.assert_close(evaluated, learned, rtol=1e-5, atol=1e-5)


def test_inside_a_task_evaluation_answers_with_its_adapter_alone():
    model, strategy = two_layers(tasks=TASKS[:2])
    begin_task(model, strategy, TASKS[2])
    steps_of(model, strategy, dialogue_batches(model, 2))
    batch = mixed(model)
    evaluated = scores(model, strategy, batch)
    assert torch.equal(evaluated, forward(model, strategy.train(), batch).logits)
    end_task(model, strategy, TASKS[2], dialogue_batches(model, 2))
    assert not torch.equal(evaluated, scores(model, strategy, batch))


def test_every_sample_of_a_step_goes_through_the_adapter_that_learns():
    model, strategy = two_layers(tasks=TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    assert {name.split(".adapters.")[1][0] for name in trainable_parameters(model)} == {"1"}
    old = replace(a_dialogue_batch(model, 4, 0), is_replay=torch.ones(4, dtype=torch.bool))
    step(model, strategy.train(), a_dialogue_batch(model, 4, 1).join(old)).loss.backward()
    for layers in by_number(model):
        for layer in layers:
            assert (layer.mode, layer.active) == ("one", (1,))
            assert layer.adapter(0).lora_B.grad is None


def test_adapters_of_tasks_that_were_passed_over_weigh_nothing():
    model, strategy = taught(*attached(make()), [TASKS[0], TASKS[2]])
    gates = strategy.prompts(model, mixed(model)).gates["hide"]
    assert gates.shape == (8, 3)
    assert not gates[:, 1].any()
    torch.testing.assert_close(gates.sum(1), torch.ones(8))


def test_last_layers_are_those_of_the_largest_numbers():
    names = ["lm.layers.2.q", "lm.layers.10.q", "lm.layers.10.mlp.up", "lm.layers.9.q"]
    assert last_layers(names, 1) == {"lm.layers.10.q", "lm.layers.10.mlp.up"}
    assert last_layers(names, 2) == {"lm.layers.10.q", "lm.layers.10.mlp.up", "lm.layers.9.q"}
    assert last_layers(names, 9) == set(names)


def test_layers_without_a_number_have_no_last_one():
    with pytest.raises(ValueError, match="'lm.head' has no layer number.*gate_layers='all'"):
        last_layers(["lm.head"], 1)
