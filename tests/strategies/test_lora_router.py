"""LoRARouter: one adapter a task, and each row through one of them."""

from dataclasses import replace

import pytest
import torch

from mmcl.core import Chain, answer, begin_task, end_task, run, step, trainable
from mmcl.layers import LowRankSlots, installed
from mmcl.strategies import ExperienceReplay, LoRARouter
from tests.stand_in import StandIn
from tests.stand_in_llava import a_dialogue_batch, a_llava, dialogue_batches
from tests.strategies.dialogue_lessons import (
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

ROUTERS = [{}, {"by": "text"}, {"router": "ridge"}, {"prototypes": 2}, {"prototypes": 30}]


def make(**how):
    return lambda: LoRARouter(**{"rank": 2, **how})


def layers_of(model):
    return list(installed(model, LowRankSlots).values())


def untold(batch):
    """As a scenario hands it that does not tell the task."""
    return replace(batch, task=torch.full_like(batch.task, -1))


def only(model, slot, batch):
    """What the model says with one slot alone."""
    for layer in layers_of(model):
        layer.activate("one", slot)
    return model(batch).logits


@pytest.mark.parametrize("how", ROUTERS[:4])
def test_what_every_strategy_of_this_track_promises(how):
    keeps_its_promises(make(**how))


@pytest.mark.parametrize("how", ROUTERS)
def test_a_checkpoint_routes_as_the_router_that_wrote_it(how):
    model, strategy = taught(*attached(make(**how)), TASKS)
    copied = restored(make(**how), state_of(model, strategy), TASKS)
    batch = untold(mixed(model))
    assert torch.equal(strategy.route(model, batch), copied[1].route(copied[0], batch))
    assert torch.equal(scores(model, strategy, batch), scores(*copied, batch))
    assert answer(model, strategy, batch) == answer(*copied, batch)


@pytest.mark.parametrize("how", ROUTERS)
def test_rows_go_through_their_tasks_own_slot_when_the_router_is_right(how):
    model, strategy = taught(*attached(make(**how)), TASKS)
    for task in range(3):
        batch = untold(a_dialogue_batch(model, 4, task, seed=9))
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
        likeness = [
            sum(
                float(torch.cosine_similarity(model.embed(one, modality)[0].double(), mean[t], 0))
                for modality, mean in zip(("image", "text"), means, strict=True)
            )
            for t in range(3)
        ]
        assert found == max(range(3), key=lambda t: likeness[t])


def test_the_ridge_route_is_that_of_least_squares_over_all_rows():
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


def test_a_mean_does_not_depend_on_how_a_pass_is_cut_into_batches():
    model, first = attached(make())
    second = LoRARouter(rank=2)
    end_task(model, first, TASKS[0], dialogue_batches(model, 0))
    cut = [b.take(rows) for b in dialogue_batches(model, 0) for rows in torch.arange(8).split(3)]
    end_task(model, second, TASKS[0], cut)
    torch.testing.assert_close(first.means.sums, second.means.sums)


def test_rows_whose_task_is_told_go_through_its_slot():
    model, strategy = taught(*attached(make()), TASKS)
    batch = a_dialogue_batch(model, 4, 0)
    wrong = replace(batch, task=torch.full_like(batch.task, 2))
    torch.testing.assert_close(
        scores(model, strategy, wrong), only(model, 2, batch), rtol=1e-5, atol=1e-5
    )


def test_inside_a_task_untold_rows_go_through_its_slot():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    steps_of(model, strategy, dialogue_batches(model, 1))
    batch = untold(a_dialogue_batch(model, 4, 0))
    torch.testing.assert_close(
        scores(model, strategy, batch), only(model, 1, batch), rtol=1e-5, atol=1e-5
    )


def test_slots_come_with_tasks_and_only_the_newest_learns():
    model, strategy = attached(make())
    for task in TASKS:
        begin_task(model, strategy, task)
        assert {name.split(".slots.")[1][0] for name in trainable(model)} == {str(task.index)}


def test_learning_a_task_leaves_the_others_answers_alone():
    model, strategy = taught(*attached(make()), TASKS[:1])
    batch = a_dialogue_batch(model, 4, 0)
    before = scores(model, strategy, batch)
    taught(model, strategy, TASKS[1:])
    torch.testing.assert_close(scores(model, strategy, batch), before, rtol=1e-5, atol=1e-5)


def test_remembered_rows_go_through_their_own_frozen_slot_and_teach_nothing():
    model, strategy = taught(*attached(make()), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    steps_of(model, strategy, dialogue_batches(model, 1)[:1])
    strategy.train()
    old = replace(a_dialogue_batch(model, 4, 0), recalled=torch.ones(4, dtype=torch.bool))
    done = step(model, strategy, old)
    torch.testing.assert_close(done.output.logits, only(model, 0, old), rtol=1e-5, atol=1e-5)
    model.zero_grad()
    step(model, strategy, old).loss.backward()
    assert all(not p.grad.any() for p in trainable(model).values() if p.grad is not None)

    both = a_dialogue_batch(model, 4, 1).join(old)
    done = step(model, strategy, both)
    is_new = done.output.rows < 4
    torch.testing.assert_close(
        done.output.logits[is_new], only(model, 1, a_dialogue_batch(model, 4, 1)),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_a_remembered_row_moves_the_projector_if_that_learns():
    model, strategy = taught(*attached(make(train_projector=True)), TASKS[:1])
    begin_task(model, strategy, TASKS[1])
    strategy.train()
    old = replace(a_dialogue_batch(model, 4, 0), recalled=torch.ones(4, dtype=torch.bool))
    step(model, strategy, old).loss.backward()
    moved = {name for name, p in trainable(model).items() if p.grad is not None and p.grad.any()}
    assert moved
    assert not any("slots" in name for name in moved)


def test_it_learns_in_a_chain_with_replay():
    model, strategy = attached(lambda: Chain([LoRARouter(rank=2), ExperienceReplay(samples=4)]))
    taught(model, strategy, TASKS[:2])
    assert strategy.recall().task.numel() == 4
    old = replace(a_dialogue_batch(model, 2, 0), recalled=torch.ones(2, dtype=torch.bool))
    begin_task(model, strategy, TASKS[2])
    steps_of(model, strategy, [a_dialogue_batch(model, 4, 2).join(old)])
    assert torch.isfinite(run(model, strategy.eval(), old).logits).all()


def test_a_slot_that_gets_none_of_its_tasks_rows_is_reported():
    model, strategy = taught(*attached(make()), TASKS[:1])
    assert strategy.idle() == ()
    begin_task(model, strategy, TASKS[1])
    same = [replace(b, task=torch.ones_like(b.task)) for b in dialogue_batches(model, 0)]
    end_task(model, strategy, TASKS[1], same)
    assert strategy.idle() == ("slot 1 was chosen for none of 24 rows of its task",)


def test_routing_before_any_task_ended_says_when_to_ask():
    model, strategy = attached(make())
    with pytest.raises(RuntimeError, match="after the first end_task"):
        strategy.route(model, mixed(model))


def test_a_pass_without_rows_names_the_task():
    model, strategy = attached(make())
    with pytest.raises(RuntimeError, match="no rows of task 'task 0'"):
        end_task(model, strategy, TASKS[0], [])


def test_a_model_without_a_language_model_is_refused():
    with pytest.raises(TypeError, match="LoRARouter needs model.answer"):
        LoRARouter().attach(StandIn())


@pytest.mark.parametrize(
    "how", [{"rank": 0}, {"dropout": 1.0}, {"by": "smell"}, {"router": "dice"}, {"prototypes": 0},
            {"ridge": 0.0}, {"router": "ridge", "prototypes": 2}]
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(how):
    with pytest.raises(ValueError, match=r": (give|choose) "):
        LoRARouter(**how)


def test_before_the_first_task_the_model_answers_as_it_is():
    model, strategy = attached(make())
    batch = mixed(model)
    assert torch.equal(scores(model, strategy, batch), a_llava()(batch).logits)
    assert trainable(model)
