"""A bare torch loop over tasks: what a user without Lightning writes, and nothing more."""

from dataclasses import replace

import torch

from mmcl.core import answers_in_words, begin_task, end_task, step, trainable
from tests.stand_in import task_batches


def batches_of(model=None):
    """What gives the batches of a task: dialogues for a model that answers, else pictures."""
    if model is None or not answers_in_words(model):
        return task_batches
    from tests.stand_in_llava import dialogue_batches

    return lambda task: dialogue_batches(model, task)


def whole(task, model=None):
    """All rows of a task in one batch; row number = sample number."""
    first, *others = batches_of(model)(task)
    for other in others:
        first = first.join(other)
    return first


def recalled_rows(recall, model=None):
    """The old samples that a strategy asks for, marked as recalled."""
    rows, starts = None, {}
    for task in recall.task.unique().tolist():
        own = whole(task, model)
        starts[task] = 0 if rows is None else len(rows)
        rows = own if rows is None else rows.join(own)
    starts = torch.tensor([starts[task] for task in recall.task.tolist()])
    rows = rows.take(starts + recall.sample)
    return replace(rows, recalled=torch.ones(len(rows), dtype=torch.bool))


def loader(task, recall, model=None):
    """The batches of a task, with old samples mixed in where the strategy asks for them."""
    batches = batches_of(model)(task)
    if recall is None or not len(recall):
        return batches
    old = recalled_rows(recall, model)
    if recall.share is None:
        return [*batches, *(old.take(part) for part in torch.arange(len(old)).split(8))]
    slots = max(1, round(recall.share * 8))
    places = [torch.arange(slots) + slots * place for place in range(len(batches))]
    return [
        batch.take(torch.arange(8 - slots)).join(old.take(place % len(old)))
        for batch, place in zip(batches, places, strict=True)
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
    learning = [*trainable(model).values(), *(p for p in strategy.parameters() if p.requires_grad)]
    optimiser = torch.optim.SGD(learning, lr=rate) if learning else None
    for batch in loader(task.index, strategy.recall(), model)[start:]:
        done = step(model, strategy, batch)
        watch(done)
        if done.loss.requires_grad and optimiser is not None:
            optimiser.zero_grad()
            done.loss.backward()
            strategy.project(model)
            optimiser.step()
        strategy.observe(model, done.batch, done.output)
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
