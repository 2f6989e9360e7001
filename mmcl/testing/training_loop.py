"""Bare training loop over the tasks of the stand-ins, with replay mixed in and nothing else.

A file of its own, because the tests of single strategies train with it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from mmcl.core import (
    Batch,
    ReplayPlan,
    StepOutput,
    Strategy,
    Task,
    begin_task,
    end_task,
    is_generative_model,
    step,
    trainable_parameters,
)
from mmcl.testing.stand_ins import answer_batches, class_batches

BATCH_SIZE = 8


def batches_of(model: Any = None) -> Callable[[int], list[Batch]]:
    """Return the function task -> its batches: questions for a generative model, else classes."""
    if model is None or not is_generative_model(model):
        return class_batches
    return lambda task: answer_batches(model, task)


def whole_task(task: int, model: Any = None) -> Batch:
    """Return all samples of a task as one batch; the sample id is the position."""
    first, *others = batches_of(model)(task)
    for other in others:
        first = first.join(other)
    return first


def replayed_samples(replay_plan: ReplayPlan, model: Any = None) -> Batch:
    """Return the old samples of a replay plan, marked as replayed."""
    wanted = replay_plan.task_ids.tolist()
    tasks = sorted(set(wanted))
    joined, starts = whole_task(tasks[0], model), {tasks[0]: 0}
    for task in tasks[1:]:
        starts[task] = len(joined)
        joined = joined.join(whole_task(task, model))
    index = torch.tensor([starts[task] for task in wanted]) + replay_plan.sample_ids
    old = joined.take(index)
    return replace(old, is_replay=torch.ones(len(old), dtype=torch.bool))


def mixed_batches(task: int, replay_plan: ReplayPlan | None, model: Any = None) -> list[Batch]:
    """Return the batches of a task, with old samples mixed in as the replay plan says."""
    batches = batches_of(model)(task)
    if replay_plan is None or not len(replay_plan):
        return batches
    old = replayed_samples(replay_plan, model)
    if replay_plan.replay_ratio is None:
        parts = torch.split(torch.arange(len(old)), BATCH_SIZE)
        return [*batches, *(old.take(part) for part in parts)]
    replayed = max(1, round(replay_plan.replay_ratio * BATCH_SIZE))
    indices = [torch.arange(replayed) + replayed * index for index in range(len(batches))]
    new = torch.arange(BATCH_SIZE - replayed)
    return [
        batch.take(new).join(old.take(index % len(old)))
        for batch, index in zip(batches, indices, strict=True)
    ]


def training_steps(
    model: Any,
    strategy: Strategy,
    task: Task,
    begun: bool = False,
    start: int = 0,
    rate: float = 0.05,
    watch: Callable[[StepOutput], None] = lambda done: None,
) -> Iterator[StepOutput]:
    """Train on one task with SGD, yielding after every step; ``end_task`` follows the last.

    Args:
        model: a stand-in.
        strategy: attached to the model.
        task: of the model's kind.
        begun: the task was begun before; it is resumed at step ``start``.
        start: number of the first step.
        rate: learning rate.
        watch: called with every step before its gradients are computed.
    """
    if not begun:
        begin_task(model, strategy, task)
    model.train()
    strategy.train()
    trainable = [*trainable_parameters(model).values()]
    trainable += [p for p in strategy.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=rate) if trainable else None
    for batch in mixed_batches(task.index, strategy.replay_plan(), model)[start:]:
        done = step(model, strategy, batch)
        watch(done)
        if done.loss.requires_grad and optimizer is not None:
            optimizer.zero_grad()
            done.loss.backward()  # type: ignore[no-untyped-call]
            strategy.project_gradients(model)
            optimizer.step()
        strategy.after_step(model, done.batch, done.output)
        yield done
    end_task(model, strategy, task, batches_of(model)(task.index))


def train_tasks(
    model: Any, strategy: Strategy, tasks: Sequence[Task], rate: float = 0.05
) -> tuple[Any, Strategy]:
    """Train on tasks one after another; return model and strategy in evaluation mode."""
    for task in tasks:
        for _ in training_steps(model, strategy, task, rate=rate):
            pass
    return model.eval(), strategy.eval()
