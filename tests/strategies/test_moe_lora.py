"""MoELoRA: experts that a router weighs per token, all of them trained on every task."""

import torch
from torch import nn

from mmcl.core import begin_task, end_task, trainable_parameters
from mmcl.layers import MoELoRALinear, find_layers
from mmcl.strategies import MoELoRA, moe_lora
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    scores,
    taught,
    trains_as_lora,
)
from tests.toys.toy_clip import StandIn, a_task, task_batches
from tests.toys.toy_llava import a_dialogue_batch, dialogue_batches


def make(**how):
    return lambda: MoELoRA(**{"num_experts": 3, "rank": 2, "samples": 8, **how})


def layers_of(model):
    return list(find_layers(model, MoELoRALinear).values())


def test_a_layer_answers_as_experts_weighed_one_by_one():
    model, _ = taught(*attached(make(alpha=6)), TASKS[:2])
    for layer in layers_of(model):
        for x in torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)):
            weights = torch.exp(layer.router @ x)
            weights = weights / weights.sum()
            expected = nn.functional.linear(x, layer.weight, layer.bias)
            for number, weight in enumerate(weights):
                A, B = layer.expert(number)
                expected = expected + 3 * weight * (B @ (A @ x))
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_what_every_strategy_of_this_track_promises():
    keeps_its_promises(make())


def test_a_new_task_changes_nothing_and_everything_resumes_learning():
    model, strategy = taught(*attached(make()), TASKS[:1])
    batch = mixed(model)
    before, names = scores(model, strategy, batch), set(trainable_parameters(model))
    begin_task(model, strategy, TASKS[1])
    assert torch.equal(scores(model, strategy, batch), before)
    assert set(trainable_parameters(model)) == names
    assert {name.rpartition(".")[2] for name in names} == {"A", "B", "router"}


def test_the_state_does_not_grow():
    model, strategy = attached(make())
    sizes = []
    for task in TASKS:
        taught(model, strategy, [task])
        sizes.append(sum(value.numel() for value in model.state_dict().values()))
    assert len(set(sizes)) == 1


def test_one_expert_is_lora():
    trains_as_lora(MoELoRA(num_experts=1, rank=3), lambda layer: layer.A, tasks=2)


def test_every_layer_starts_in_its_own_way_and_the_same_every_time():
    def starts(seed):
        return [layer.A.detach() for layer in layers_of(attached(make(seed=seed))[0])]

    first, again, other = starts(0), starts(0), starts(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    assert not torch.equal(first[0], first[1])


def test_mean_weights_are_those_of_real_tokens_counted_one_by_one():
    model, strategy = attached(make(samples=5))
    begin_task(model, strategy, TASKS[0])
    batches = dialogue_batches(model, 0, rows=4)
    end_task(model, strategy, TASKS[0], batches)
    total, tokens = torch.zeros(3, dtype=torch.float64), 0

    def watch(layer, given):
        nonlocal total, tokens
        for x in given[0][0]:
            total += (layer.router @ x).softmax(0).double()
            tokens += 1

    hook = layers_of(model)[0].register_forward_pre_hook(watch)
    five = batches[0].join(batches[1].take(torch.tensor([0])))
    for row in range(5):
        alone = five.take(torch.tensor([row]))
        length = int(alone.attention_mask.sum())
        cut = {
            name: getattr(alone, name)[:, :length]
            for name in ("input_ids", "attention_mask", "labels")
        }
        scores(model, strategy, type(alone)(**{**vars(alone), **cut}))
    hook.remove()
    torch.testing.assert_close(
        strategy.mean_weights[0].double(), total / tokens, rtol=1e-5, atol=1e-7
    )


def test_two_ranks_look_at_the_samples_that_one_looks_at(monkeypatch):
    model, strategy = attached(make(samples=5))
    batches = dialogue_batches(model, 0, rows=8)
    end_task(model, strategy, TASKS[0], batches)
    whole, parts = strategy.mean_weights, []
    for rank in (0, 1):
        monkeypatch.setattr(moe_lora, "rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(moe_lora, "all_reduce_sum", lambda own: parts.append(own) or own)
        own = [batch.take(torch.arange(rank, 8, 2)) for batch in batches]
        end_task(model, strategy, TASKS[0], own)
    total = parts[0] + parts[1]
    torch.testing.assert_close((total[:, :-1] / total[:, -1:]).float(), whole)


def test_an_expert_that_no_token_wants_is_named():
    model, strategy = StandIn(), MoELoRA(num_experts=3, rank=2)
    strategy.attach(model)
    begin_task(model, strategy, a_task(0))
    end_task(model, strategy, a_task(0), task_batches(0))
    assert strategy.inactive_parts() == ()
    with torch.no_grad():  # images are not negative, so one router's row far below loses always
        model.patch.router.zero_()[1] = -1000.0
    end_task(model, strategy, a_task(0), task_batches(0))
    assert strategy.inactive_parts() == (
        "1 of 3 experts weigh less than 0.01 on average, the first of them expert 1 of layer 0",
    )
    assert not model.patch._forward_pre_hooks


def test_looking_can_be_switched_off():
    model, strategy = taught(*attached(make(samples=0)), TASKS[:1])
    assert not strategy.mean_weights.any()
    assert strategy.inactive_parts() == ()


def test_a_gradient_reaches_every_part_in_the_end():
    model, strategy = taught(*attached(make()), TASKS[:1])
    model.zero_grad()
    batch = a_dialogue_batch(model)
    model.loss(model(batch), batch).backward()
    assert all(p.grad.any() for p in trainable_parameters(model).values())
