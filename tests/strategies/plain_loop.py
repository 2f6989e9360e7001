"""A bare torch loop over tasks: what a user without Lightning writes, and nothing more."""

from dataclasses import replace

import torch

from mmcl.core import begin_task, end_task, is_generative_model, step, trainable_parameters
from tests.toys.toy_clip import task_batches


def batches_of(model=None):
    """What gives the batches of a task: dialogues for a model that answers, else images."""
    if model is None or not is_generative_model(model):
        return task_batches
    from tests.toys.toy_llava import dialogue_batches

    return lambda task: dialogue_batches(model, task)


def whole(task, model=None):
    """All rows of a task in one batch; row number = sample number."""
    first, *others = batches_of(model)(task)
    for other in others:
        first = first.join(other)
    return first


def replayed_samples(replay_plan, model=None):
    """The old samples of a strategy's replay plan, marked as replayed."""
    rows, starts = None, {}
    for task in replay_plan.task_ids.unique().tolist():
        own = whole(task, model)
        starts[task] = 0 if rows is None else len(rows)
        rows = own if rows is None else rows.join(own)
    starts = torch.tensor([starts[task] for task in replay_plan.task_ids.tolist()])
    rows = rows.take(starts + replay_plan.sample_ids)
    return replace(rows, is_replay=torch.ones(len(rows), dtype=torch.bool))


def loader(task, replay_plan, model=None):
    """The batches of a task, with old samples mixed in where the strategy replays them."""
    batches = batches_of(model)(task)
    if replay_plan is None or not len(replay_plan):
        return batches
    old = replayed_samples(replay_plan, model)
    if replay_plan.replay_ratio is None:
        return [*batches, *(old.take(part) for part in torch.arange(len(old)).split(8))]
    replayed = max(1, round(replay_plan.replay_ratio * 8))
    indices = [torch.arange(replayed) + replayed * index for index in range(len(batches))]
    return [
        batch.take(torch.arange(8 - replayed)).join(old.take(index % len(old)))
        for batch, index in zip(batches, indices, strict=True)
    ]


def lesson(model, strategy, task, begun=False, start=0, rate=0.05, watch=lambda done: None):
    """Learn one task, stopping after every step to give it away.

    ``begun`` goes on with a task that was begun before, from step number ``start``; ``watch`` sees
    every step before its gradients are taken.
    """
    if not begun:
        begin_task(model, strategy, task)
    model.train()
    strategy.train()
    learning = [
        *trainable_parameters(model).values(),
        *(p for p in strategy.parameters() if p.requires_grad),
    ]
    optimizer = torch.optim.SGD(learning, lr=rate) if learning else None
    for batch in loader(task.index, strategy.replay_plan(), model)[start:]:
        done = step(model, strategy, batch)
        watch(done)
        if done.loss.requires_grad and optimizer is not None:
            optimizer.zero_grad()
            done.loss.backward()
            strategy.project_gradients(model)
            optimizer.step()
        strategy.after_step(model, done.batch, done.output)
        yield done
    end_task(model, strategy, task, batches_of(model)(task.index))


def learn(model, strategy, tasks, rate=0.05):
    """Learn tasks one after another; the strategy is attached."""
    for task in tasks:
        for _ in lesson(model, strategy, task, rate=rate):
            pass
    model.eval()
    strategy.eval()
    return model, strategy
