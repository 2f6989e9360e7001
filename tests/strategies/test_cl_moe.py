"""CLMoE: shared experts, weighed by row and by task, merged with momentum."""

import copy
from dataclasses import replace

import pytest
import torch

from mmcl.core import Chain, begin_task, end_task, run, step, trainable
from mmcl.layers import LowRankSlots, installed
from mmcl.strategies import CLMoE, ExperienceReplay
from tests.stand_in import StandIn
from tests.stand_in_llava import a_dialogue_batch, dialogue_batches
from tests.strategies.dialogue_lessons import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    steps_of,
    taught,
)


def make(**how):
    return lambda: CLMoE(**{"rank": 2, "experts": 4, **how})


def layers_of(model):
    return list(installed(model, LowRankSlots).values())


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


@pytest.mark.parametrize("how", [{}, {"top_k": 1}, {"instance_share": 0.0}])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


def test_in_training_the_row_alone_weighs_the_experts():
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


def test_a_layer_answers_with_its_experts_weighed_for_each_row():
    model, strategy = taught(*attached(uneven(make(alpha=6))), TASKS[:2])
    batch = mixed(model)
    run(model, strategy, batch)
    gates = gates_of(strategy, model, batch).float()
    for place, layer in enumerate(layers_of(model)):
        x = torch.randn(8, 3, layer.in_features, generator=torch.Generator().manual_seed(1))
        for row in range(8):
            expected = torch.nn.functional.linear(x[row], layer.weight, layer.bias)
            for expert, slot in enumerate(layer.slots):
                expected = expected + 3 * gates[row, place, expert] * (x[row] @ slot.A.T @ slot.B.T)
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
    shares = set()
    for place, (name, layer) in enumerate(installed(model, LowRankSlots).items()):
        led, leads = (set(usage[place].topk(2).indices.tolist()) for usage in (before, now))
        for expert in range(4):
            share = 0.3 if expert in led - leads else 0.7
            shares.add(share)
            for side in "AB":
                key = f"{name}.slots.{expert}.{side}"
                expected = share * old[key] + (1 - share) * new[key]
                torch.testing.assert_close(getattr(layer.slot(expert), side), expected)
    assert shares == {0.3, 0.7}


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
    assert {name.split(".slots.")[1][0] for name in trainable(model)} == set("0123")


def test_usage_does_not_depend_on_batches():
    model, first = attached(uneven(make()))
    other, second = attached(uneven(make()))
    end_task(model, first, TASKS[0], dialogue_batches(model, 0))
    rows = [b.take(r) for b in dialogue_batches(model, 0) for r in torch.arange(8).split(3)]
    end_task(other, second, TASKS[0], rows)
    torch.testing.assert_close(first.usage.tensors, second.usage.tensors)


def test_experts_that_no_row_chose_are_reported():
    model, strategy = attached(make(top_k=1))
    with torch.no_grad():
        strategy.router.zero_()
        strategy.router[:, 2] = 100 * model.embed(mixed(model), "text")[0].sum().sign()
    taught(model, strategy, TASKS[:1], rate=0.0)
    chosen = strategy.usage.get("chosen")
    unused = [str(e) for e in range(4) if not chosen[e]]
    assert unused
    assert strategy.idle() == (f"experts {', '.join(unused)} of 4 were never chosen",)


def test_it_learns_in_a_chain_with_replay():
    model, strategy = attached(lambda: Chain([CLMoE(rank=2), ExperienceReplay(samples=4)]))
    taught(model, strategy, TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    old = replace(a_dialogue_batch(model, 2, 0), recalled=torch.ones(2, dtype=torch.bool))
    steps_of(model, strategy, [a_dialogue_batch(model, 4, 1).join(old)])
    assert torch.isfinite(scores(model, strategy, mixed(model))).all()


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(TypeError, match="CLMoE needs model.answer"):
        CLMoE().attach(StandIn())


@pytest.mark.parametrize(
    ("how", "said"),
    [({"top_k": 5}, r"top_k must be 1 to 4"), ({"momentum": 1.5}, "momentum is 1.5"),
     ({"rank": 0}, "rank is 0"), ({"instance_share": -1.0}, "instance_share -1.0")],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        CLMoE(**how)
