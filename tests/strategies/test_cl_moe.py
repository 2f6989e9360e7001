"""CLMoE: shared experts, weighed by row and by task, merged with momentum."""

import copy

import pytest
import torch

from mmcl.core import begin_task, end_task, forward, step, trainable_parameters
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.strategies import CLMoE
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    steps_of,
    taught,
)
from tests.toys.toy_llava import a_dialogue_batch, dialogue_batches


def make(**how):
    return lambda: CLMoE(**{"rank": 2, "num_experts": 4, **how})


def layers_of(model):
    return list(find_layers(model, MultiLoRALinear).values())


def uneven(make_strategy):
    """A router that does not weigh all experts alike, so that sets of leading ones differ."""

    def made():
        strategy = make_strategy()
        attach = strategy.attach

        def attach_and_spread(model):
            attach(model)
            with torch.no_grad():
                strategy.router *= 12

        strategy.attach = attach_and_spread
        return strategy

    return made


def instance_weights(model, strategy, batch):
    """Softmax of each layer's router over the row's embeddings, row by row."""
    found = []
    for row in range(len(batch)):
        own = batch.take(torch.tensor([row]))
        seen = torch.cat([model.embed(own, m)[0] for m in ("image", "text")]).double()
        by_layer = []
        for router in strategy.router.detach().double():
            scores = [float(expert @ seen) for expert in router]
            by_layer.append(torch.tensor(scores, dtype=torch.float64).softmax(0))
        found.append(torch.stack(by_layer))
    return torch.stack(found)


def usage_of(model, strategy, task):
    passed = dialogue_batches(model, task)
    return torch.cat([instance_weights(model, strategy, batch) for batch in passed]).mean(0)


def top_two(weights):
    """Two largest weights of (B, layers, E), renormalised by loops."""
    gates = torch.zeros_like(weights)
    for row in range(weights.shape[0]):
        for layer in range(weights.shape[1]):
            best = sorted(range(weights.shape[2]), key=lambda e: -float(weights[row, layer, e]))[:2]
            total = sum(float(weights[row, layer, e]) for e in best)
            for e in best:
                gates[row, layer, e] = weights[row, layer, e] / total
    return gates


def gates_of(strategy, model, batch):
    gates = strategy.prompts(model, batch).gates
    return torch.stack([gates[f"cl_moe.{place}"] for place in range(len(gates))], 1).double()


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"instance_weight": 0.0}])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_in_training_the_sample_alone_weighs_the_experts():
    model, strategy = attached(uneven(make()))
    begin_task(model, strategy, TASKS[0])
    batch = mixed(model)
    expected = top_two(instance_weights(model, strategy, batch))
    torch.testing.assert_close(
        gates_of(strategy.train(), model, batch), expected, rtol=0, atol=1e-6
    )


def test_in_evaluation_half_of_the_weight_is_the_usage_of_the_nearest_task():
    model, strategy = attached(uneven(make()))
    usages = []
    for task in TASKS:
        taught(model, strategy, [task])
        usages.append(usage_of(model, strategy, task.index))
    stored = strategy.usage.get("usage")
    torch.testing.assert_close(stored, torch.stack(usages), rtol=0, atol=1e-6)
    batch = mixed(model)
    near = strategy.nearest_task(strategy.means.features(model, batch, strategy))
    assert near.tolist() == [0] * 4 + [1] * 4
    mix = 0.5 * instance_weights(model, strategy, batch) + 0.5 * stored[near]
    torch.testing.assert_close(gates_of(strategy, model, batch), top_two(mix), rtol=0, atol=1e-6)


def test_a_layer_answers_with_its_experts_weighed_for_each_sample():
    model, strategy = taught(*attached(uneven(make(alpha=6))), TASKS[:2])
    batch = mixed(model)
    forward(model, strategy, batch)
    gates = gates_of(strategy, model, batch).float()
    for place, layer in enumerate(layers_of(model)):
        x = torch.randn(8, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
        for row in range(8):
            expected = torch.nn.functional.linear(x[row], layer.weight, layer.bias)
            for expert, adapter in enumerate(layer.adapters):
                expected = expected + 3 * gates[row, place, expert] * (
                    x[row] @ adapter.lora_A.T @ adapter.lora_B.T
                )
            torch.testing.assert_close(layer(x)[row], expected, rtol=1e-4, atol=1e-4)


def test_the_merge_keeps_less_of_experts_that_led_only_in_the_task_before():
    model, strategy = taught(*attached(uneven(make())), TASKS[:1])
    old = copy.deepcopy(model.state_dict())
    before = strategy.usage.get("usage")[0]
    begin_task(model, strategy, TASKS[1])
    steps_of(model, strategy, dialogue_batches(model, 1))
    with torch.no_grad():
        strategy.router[0] = strategy.router[0].flip(0)  # other experts lead in the first layer
    new = copy.deepcopy(model.state_dict())
    now = usage_of(model, strategy, 1)
    end_task(model, strategy, TASKS[1], dialogue_batches(model, 1))
    fractions = set()
    for place, (name, layer) in enumerate(find_layers(model, MultiLoRALinear).items()):
        led, leads = (set(usage[place].topk(2).indices.tolist()) for usage in (before, now))
        for expert in range(4):
            fraction = 0.3 if expert in led - leads else 0.7
            fractions.add(fraction)
            for side in "AB":
                key = f"{name}.adapters.{expert}.lora_{side}"
                expected = fraction * old[key] + (1 - fraction) * new[key]
                torch.testing.assert_close(getattr(layer.adapter(expert), f"lora_{side}"), expected)
    assert fractions == {0.3, 0.7}


def test_the_first_task_is_not_merged():
    model, strategy = attached(make())
    begin_task(model, strategy, TASKS[0])
    steps_of(model, strategy, dialogue_batches(model, 0))
    before = copy.deepcopy(model.state_dict())
    end_task(model, strategy, TASKS[0], dialogue_batches(model, 0))
    assert all(torch.equal(before[name], own) for name, own in model.state_dict().items())


def test_experts_and_router_learn():
    model, strategy = attached(make())
    begin_task(model, strategy, TASKS[0])
    steps_of(model, strategy, dialogue_batches(model, 0)[:1])
    step(model, strategy.train(), a_dialogue_batch(model)).loss.backward()
    assert strategy.router.grad.any()
    assert {name.split(".adapters.")[1][0] for name in trainable_parameters(model)} == set("0123")


def test_usage_does_not_depend_on_batches():
    model, first = attached(uneven(make()))
    other, second = attached(uneven(make()))
    end_task(model, first, TASKS[0], dialogue_batches(model, 0))
    rows = [b.take(r) for b in dialogue_batches(model, 0) for r in torch.arange(8).split(3)]
    end_task(other, second, TASKS[0], rows)
    torch.testing.assert_close(first.usage.tensors, second.usage.tensors)


def test_experts_that_no_sample_chose_are_reported():
    model, strategy = attached(make(top_k=1))
    with torch.no_grad():
        strategy.router.zero_()
        strategy.router[:, 2] = 100 * model.embed(mixed(model), "text")[0].sum().sign()
    taught(model, strategy, TASKS[:1], rate=0.0)
    chosen = strategy.usage.get("chosen")
    unused = [str(e) for e in range(4) if not chosen[e]]
    assert unused
    assert strategy.inactive_parts() == (f"experts {', '.join(unused)} of 4 were never chosen",)
