"""HiDe: fused slots below, softly chosen ones in the last layer."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import Chain, begin_task, end_task, run, step, trainable
from mmcl.layers import LowRankSlots, installed
from mmcl.strategies import ExperienceReplay, HiDe
from mmcl.strategies.hide import last_layers
from tests.stand_in import StandIn
from tests.stand_in_llava import a_dialogue_batch, a_llava, dialogue_batches
from tests.strategies.dialogue_lessons import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    steps_of,
    taught,
)

WAYS = [{}, {"fuse": "released"}, {"gate_layers": "all", "image_share": 0.0, "temperature": 0.05}]


def make(**how):
    return lambda: HiDe(**{"rank": 2, **how})


def two_layers(how=None, tasks=TASKS):
    """Learned with a language model of two layers."""
    return taught(*attached(make(**(how or {})), layers=2), tasks)


def by_number(model):
    """Layers of number 0, and of number 1."""
    layers = installed(model, LowRankSlots)
    return [[own for name, own in layers.items() if f".layers.{n}." in name] for n in (0, 1)]


def expected_weights(model, batch, tasks=3, image_share=0.5, temperature=0.1):
    """Softmax over likeness to means, in loops."""
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
        likeness = torch.zeros(tasks, dtype=torch.float64)
        for modality, share in (("image", image_share), ("text", 1 - image_share)):
            seen = model.embed(own, modality)[0].double()
            for task in range(tasks):
                mean = means[modality, task]
                likeness[task] += share * (seen @ mean) / (seen.norm() * mean.norm())
        weights.append(torch.exp(likeness / temperature))
        weights[-1] = weights[-1] / weights[-1].sum()
    return torch.stack(weights)


@pytest.mark.parametrize("how", WAYS)
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_what_it_promises_holds_with_lower_layers_too():
    model, strategy = two_layers()
    batch, plain = mixed(model), None
    plain = scores(model, strategy, batch)
    with strategy.folded(model):
        assert [layer.can_fold for layer in by_number(model)[0]] == [True] * 7
        torch.testing.assert_close(scores(model, strategy, batch), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(scores(model, strategy, batch), plain)


def test_means_that_weigh_the_last_layer_are_those_of_every_row():
    model, strategy = two_layers()
    batch = mixed(model)
    gates = strategy.prompts(model, batch).gates["hide"]
    torch.testing.assert_close(gates.double(), expected_weights(model, batch), rtol=0, atol=1e-5)


def test_lower_layers_add_products_and_the_last_weighs_them_for_each_row():
    model, strategy = two_layers()
    batch = mixed(model)
    run(model, strategy, batch)
    weights, (lower, last) = expected_weights(model, batch).float(), by_number(model)
    for layer in lower + last:
        x = torch.randn(8, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
        base = torch.nn.functional.linear(x, layer.weight, layer.bias)
        for row in range(8):
            expected = base[row].clone()
            for task in range(3):
                slot = layer.slot(task)
                weight = float(weights[row, task]) if layer in last else 1.0
                expected += 2 * weight * (x[row] @ slot.A.T @ slot.B.T)
            torch.testing.assert_close(layer(x)[row], expected, rtol=1e-4, atol=1e-4)


def test_the_released_fusion_multiplies_the_sums():
    model, strategy = two_layers({"fuse": "released"})
    run(model, strategy, mixed(model))
    layer = by_number(model)[0][0]
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    A, B = (sum(getattr(slot, side) for slot in layer.slots) for side in "AB")
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias) + 2 * (x @ A.T @ B.T)
    torch.testing.assert_close(layer(x), expected)


def test_all_layers_can_be_gated():
    model, strategy = two_layers(WAYS[2])
    batch = mixed(model)
    run(model, strategy, batch)
    assert {layer.mode for layers in by_number(model) for layer in layers} == {"gates"}
    expected = expected_weights(model, batch, image_share=0.0, temperature=0.05)
    torch.testing.assert_close(
        strategy.prompts(model, batch).gates["hide"].double(), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("how", WAYS)
def test_after_one_task_inference_is_the_forward_pass_of_training(how):
    model, strategy = two_layers(how, TASKS[:1])
    batch = mixed(model)
    asked = scores(model, strategy, batch)
    learned = run(model, strategy.train(), batch).logits
    torch.testing.assert_close(asked, learned, rtol=1e-5, atol=1e-5)


def test_inside_a_task_evaluation_answers_with_its_slot_alone():
    model, strategy = two_layers(tasks=TASKS[:2])
    begin_task(model, strategy, TASKS[2])
    steps_of(model, strategy, dialogue_batches(model, 2))
    batch = mixed(model)
    asked = scores(model, strategy, batch)
    assert torch.equal(asked, run(model, strategy.train(), batch).logits)
    end_task(model, strategy, TASKS[2], dialogue_batches(model, 2))
    assert not torch.equal(asked, scores(model, strategy, batch))


def test_every_row_of_a_step_goes_through_the_slot_that_learns():
    model, strategy = two_layers(tasks=TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    assert {name.split(".slots.")[1][0] for name in trainable(model)} == {"1"}
    old = replace(a_dialogue_batch(model, 4, 0), recalled=torch.ones(4, dtype=torch.bool))
    step(model, strategy.train(), a_dialogue_batch(model, 4, 1).join(old)).loss.backward()
    for layers in by_number(model):
        for layer in layers:
            assert (layer.mode, layer.active) == ("one", (1,))
            assert layer.slot(0).B.grad is None


def test_slots_of_tasks_that_were_passed_over_weigh_nothing():
    model, strategy = taught(*attached(make()), [TASKS[0], TASKS[2]])
    gates = strategy.prompts(model, mixed(model)).gates["hide"]
    assert gates.shape == (8, 3)
    assert not gates[:, 1].any()
    torch.testing.assert_close(gates.sum(1), torch.ones(8))


def test_means_do_not_depend_on_batches():
    model, first = attached(make())
    second = HiDe(rank=2)
    end_task(model, first, TASKS[0], dialogue_batches(model, 0))
    rows = [b.take(r) for b in dialogue_batches(model, 0) for r in torch.arange(8).split(3)]
    end_task(model, second, TASKS[0], rows)
    assert first.means.counts.tolist() == second.means.counts.tolist() == [24]
    torch.testing.assert_close(first.means.sums, second.means.sums)


def test_it_learns_in_a_chain_with_replay():
    model, strategy = attached(lambda: Chain([HiDe(rank=2), ExperienceReplay(samples=4)]))
    taught(model, strategy, TASKS[:2])
    assert torch.isfinite(scores(model, strategy, mixed(model))).all()


def test_last_layers_are_those_of_the_largest_numbers():
    names = ["lm.layers.2.q", "lm.layers.10.q", "lm.layers.10.mlp.up", "lm.layers.9.q"]
    assert last_layers(names, 1) == {"lm.layers.10.q", "lm.layers.10.mlp.up"}
    assert last_layers(names, 2) == {"lm.layers.10.q", "lm.layers.10.mlp.up", "lm.layers.9.q"}
    assert last_layers(names, 9) == set(names)


def test_layers_without_a_number_have_no_last_one():
    with pytest.raises(ValueError, match="'lm.head' has no layer number.*gate_layers='all'"):
        last_layers(["lm.head"], 1)


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(TypeError, match="HiDe needs model.answer"):
        HiDe().attach(StandIn())


@pytest.mark.parametrize(
    "how", [{"rank": 0}, {"fuse": "both"}, {"gate_layers": "some"}, {"temperature": 0.0},
            {"image_share": 2.0}, {"expanded_layers": 0}]
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(how):
    with pytest.raises(ValueError, match=r": (give|choose) "):
        HiDe(**how)


def test_before_the_first_task_the_model_answers_as_it_is():
    model, strategy = attached(make())
    batch = mixed(model)
    assert torch.equal(scores(model, strategy, batch), a_llava()(batch).logits)
    assert trainable(model)
