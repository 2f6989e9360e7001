"""LoRARouter: one adapter a task, and each row through one of them."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import begin_task, end_task, generate, step, trainable_parameters
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.strategies import LoRARouter
from tests.strategies.generative_fixtures import (
    TASKS,
    attached,
    keeps_its_promises,
    mixed,
    restored,
    scores,
    state_of,
    steps_of,
    taught,
)
from tests.toys.toy_llava import a_dialogue_batch, dialogue_batches

ROUTERS = [{}, {"route_by": "text"}, {"router": "ridge"}, {"prototypes": 2}, {"prototypes": 30}]


def make(**how):
    return lambda: LoRARouter(**{"rank": 2, **how})


def layers_of(model):
    return list(find_layers(model, MultiLoRALinear).values())


def without_task_ids(batch):
    """As a scenario hands it that does not tell the task."""
    return replace(batch, task_ids=torch.full_like(batch.task_ids, -1))


def only(model, adapter, batch):
    """Output of the model with one adapter alone."""
    for layer in layers_of(model):
        layer.set_adapters("one", adapter)
    return model(batch).logits


@pytest.mark.parametrize("how", ROUTERS[:4])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


@pytest.mark.parametrize("how", ROUTERS)
def test_a_checkpoint_routes_as_the_router_that_wrote_it(how):
    model, strategy = taught(*attached(make(**how)), TASKS)
    copied = restored(make(**how), state_of(model, strategy), TASKS)
    batch = without_task_ids(mixed(model))
    assert torch.equal(strategy.route(model, batch), copied[1].route(copied[0], batch))
    assert torch.equal(scores(model, strategy, batch), scores(*copied, batch))
    assert generate(model, strategy, batch) == generate(*copied, batch)


@pytest.mark.parametrize("how", ROUTERS)
def test_samples_go_through_their_tasks_own_adapter_when_the_router_is_right(how):
    model, strategy = taught(*attached(make(**how)), TASKS)
    for task in range(3):
        batch = without_task_ids(a_dialogue_batch(model, 4, task, seed=9))
        assert strategy.route(model, batch).tolist() == [task] * 4
        routed = scores(model, strategy, batch)
        torch.testing.assert_close(routed, only(model, task, batch), rtol=1e-5, atol=1e-5)


def test_the_prototype_route_is_the_nearest_mean_of_both_embeddings():
    model, strategy = taught(*attached(make()), TASKS)
    batch = mixed(model)
    means = [[], []]
    for task in range(3):
        rows = [b.take(torch.tensor([r])) for b in dialogue_batches(model, task) for r in range(8)]
        for place, modality in enumerate(("image", "text")):
            seen = [model.embed(row, modality)[0].double() for row in rows]
            means[place].append(sum(seen) / len(seen))
    for row, found in enumerate(strategy.route(model, batch).tolist()):
        one = batch.take(torch.tensor([row]))
        similarity = [
            sum(
                float(torch.cosine_similarity(model.embed(one, modality)[0].double(), mean[t], 0))
                for modality, mean in zip(("image", "text"), means, strict=True)
            )
            for t in range(3)
        ]
        assert found == max(range(3), key=lambda t: similarity[t])


def test_the_ridge_route_is_that_of_least_squares_over_all_samples():
    model, strategy = taught(*attached(make(router="ridge", ridge=0.5)), TASKS)
    rows, targets = [], []
    for task in range(3):
        for batch in dialogue_batches(model, task):
            rows.append(torch.cat([model.embed(batch, m) for m in ("image", "text")], 1).double())
            targets += [task] * len(batch)
    h, y = torch.cat(rows), torch.nn.functional.one_hot(torch.tensor(targets)).double()
    expected = torch.linalg.solve(h.T @ h + 0.5 * torch.eye(h.shape[1]), h.T @ y)
    torch.testing.assert_close(strategy.solved.get("head"), expected)


def test_the_ridge_does_not_depend_on_the_order_of_the_passes():
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        model, strategy = attached(make(router="ridge"))
        for task in order:
            end_task(model, strategy, TASKS[task], dialogue_batches(model, task))
        found.append(strategy.solved.get("head"))
    torch.testing.assert_close(*found)


def test_samples_with_a_task_id_go_through_its_adapter():
    model, strategy = taught(*attached(make()), TASKS)
    batch = a_dialogue_batch(model, 4, 0)
    wrong = replace(batch, task_ids=torch.full_like(batch.task_ids, 2))
    torch.testing.assert_close(
        scores(model, strategy, wrong), only(model, 2, batch), rtol=1e-5, atol=1e-5
    )


def test_inside_a_task_unknown_task_samples_go_through_its_adapter():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    steps_of(model, strategy, dialogue_batches(model, 1))
    batch = without_task_ids(a_dialogue_batch(model, 4, 0))
    torch.testing.assert_close(
        scores(model, strategy, batch), only(model, 1, batch), rtol=1e-5, atol=1e-5
    )


def test_adapters_come_with_tasks_and_only_the_newest_learns():
    model, strategy = attached(make())
    for task in TASKS:
        begin_task(model, strategy, task)
        assert {name.split(".adapters.")[1][0] for name in trainable_parameters(model)} == {
            str(task.index)
        }


def test_learning_a_task_leaves_the_others_answers_alone():
    model, strategy = taught(*attached(make()), TASKS[:1])
    batch = a_dialogue_batch(model, 4, 0)
    before = scores(model, strategy, batch)
    taught(model, strategy, TASKS[1:])
    torch.testing.assert_close(scores(model, strategy, batch), before, rtol=1e-5, atol=1e-5)


def test_stored_samples_go_through_their_own_frozen_adapter_and_teach_nothing():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    steps_of(model, strategy, dialogue_batches(model, 1)[:1])
    strategy.train()
    old = replace(a_dialogue_batch(model, 4, 0), is_replay=torch.ones(4, dtype=torch.bool))
    done = step(model, strategy, old)
    torch.testing.assert_close(done.output.logits, only(model, 0, old), rtol=1e-5, atol=1e-5)
    model.zero_grad()
    step(model, strategy, old).loss.backward()
    assert all(not p.grad.any() for p in trainable_parameters(model).values() if p.grad is not None)

    both = a_dialogue_batch(model, 4, 1).join(old)
    done = step(model, strategy, both)
    is_new = done.output.sample_index < 4
    torch.testing.assert_close(
        done.output.logits[is_new], only(model, 1, a_dialogue_batch(model, 4, 1)),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_a_stored_sample_moves_the_projector_if_that_learns():
    model, strategy = taught(*attached(make(train_projector=True)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    strategy.train()
    old = replace(a_dialogue_batch(model, 4, 0), is_replay=torch.ones(4, dtype=torch.bool))
    step(model, strategy, old).loss.backward()
    moved = {
        name
        for name, p in trainable_parameters(model).items()
        if p.grad is not None and p.grad.any()
    }
    assert moved
    assert not any("adapters" in name for name in moved)


def test_an_adapter_that_gets_none_of_its_tasks_samples_is_reported():
    model, strategy = taught(*attached(make()), TASKS[:1])
    assert strategy.inactive_parts() == ()
    begin_task(model, strategy, TASKS[1])
    same = [replace(b, task_ids=torch.ones_like(b.task_ids)) for b in dialogue_batches(model, 0)]
    end_task(model, strategy, TASKS[1], same)
    assert strategy.inactive_parts() == ("adapter 1 was chosen for none of 24 samples of its task",)


def test_routing_before_any_task_ended_says_when_to_ask():
    model, strategy = attached(make())
    with pytest.raises(RuntimeError, match="after the first end_task"):
        strategy.route(model, mixed(model))


def test_a_pass_without_samples_names_the_task():
    model, strategy = attached(make())
    with pytest.raises(RuntimeError, match="no samples of task 'task 0'"):
        end_task(model, strategy, TASKS[0], [])
