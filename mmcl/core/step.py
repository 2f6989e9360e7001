"""Where model and strategy meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmcl.core.batch import Batch
from mmcl.core.model import VLM, require
from mmcl.core.output import Output
from mmcl.core.strategy import Strategy
from mmcl.core.task import Task


@dataclass(frozen=True)
class Step:
    """A finished forward pass.

    Attributes:
        loss: scalar, the sum of the terms; call ``backward`` on it.
        terms: "task" and every penalty by name, each a scalar.
        batch: the rows that were seen, remembered ones included.
        output: after ``refine``.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    batch: Batch
    output: Output


def run(model: VLM, strategy: Strategy, batch: Batch) -> Output:
    """Answer a batch: prompts, model, refine. The one path of training and inference."""
    prompts = strategy.prompts(model, batch)
    return strategy.refine(model, batch, model(batch, prompts))


def answer(model: VLM, strategy: Strategy, batch: Batch, **how: Any) -> list[str]:
    """Let a generative model answer a batch, through the same hooks as ``run``.

    Args:
        model: with ``answer(batch, prompts, refine=..., **how)``.
        strategy: attached to it; its ``refine`` sees the scores of every next token, (B, V).
        batch: rows whose tokens end before or behind the answer, which is not looked at.
        how: ``candidates`` and ``max_new_tokens``, see the model.

    Returns:
        B texts.
    """
    able = require(model, "answer", by=strategy)
    refine = None
    if strategy.uses("refine"):

        def refine(output: Output) -> Output:
            return strategy.refine(model, batch, output)

    said: list[str] = able.answer(batch, strategy.prompts(model, batch), refine=refine, **how)
    return said


def step(model: VLM, strategy: Strategy, batch: Batch) -> Step:
    """Compute the loss of a training step.

    Args:
        model: any VLM.
        strategy: attached to it, with a task begun.
        batch: new rows (and those its loader recalled).

    Raises:
        RuntimeError: if no task was begun, which means that the strategy's other hooks would
            never run.
    """
    if strategy.current is None:
        raise RuntimeError(
            f"{type(strategy).__name__} was given a step before begin_task: in Lightning add "
            "callbacks=[StrategyHooks()] to the Trainer, in a bare loop call "
            "mmcl.core.begin_task(model, strategy, task) first"
        )
    batch = strategy.replay(model, batch)
    output = run(model, strategy, batch)
    loss = strategy.objective(model, batch, output)
    if loss is None:
        loss = model.loss(output, batch)
    terms: dict[str, Tensor] = {"task": loss}
    for name, term in strategy.penalty(model, batch, output).items():
        if name in terms:
            raise ValueError(f"two loss terms are named '{name}': give each penalty its own name")
        terms[name] = term
        loss = loss + term
    return Step(loss, terms, batch, output)


def begin_task(model: VLM, strategy: Strategy, task: Task) -> None:
    """Start a task: the strategy grows for it and knows what it learns."""
    strategy.begin_task(model, task)
    strategy.current = task


def end_task(model: VLM, strategy: Strategy, task: Task, batches: Iterable[Batch]) -> None:
    """End a task: the strategy learns from one exact pass over its data."""
    strategy.end_task(model, task, batches)
