"""Training step, forward pass and generation: the functions in which model and strategy meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcl.core.batch import IGNORE_INDEX, Batch
from mmcl.core.distributed import all_reduce_sum, rank_and_world
from mmcl.core.model import VLM, Output, require
from mmcl.core.strategy import Strategy
from mmcl.core.task import Task


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step before the backward pass.

    Attributes:
        loss: scalar, the sum of the terms; call ``backward`` on it.
        terms: "task" and every penalty by name, each a scalar.
        batch: the samples of the forward pass, replayed ones included.
        output: the model's output after the strategy's ``transform_output``.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    batch: Batch
    output: Output


def forward(model: VLM, strategy: Strategy, batch: Batch) -> Output:
    """Forward pass of training and inference: prompts, model, ``transform_output``."""
    prompts = strategy.prompts(model, batch)
    return strategy.transform_output(model, batch, model(batch, prompts))


def generate(model: VLM, strategy: Strategy, batch: Batch, **how: Any) -> list[str]:
    """Generate the answers of a batch with a generative model, through the hooks of ``forward``.

    Args:
        model: has ``generate(batch, prompts, transform_output=..., **how)``.
        strategy: attached to the model; its ``transform_output`` gets the next-token scores (B, V)
            of every decoding step.
        batch: samples whose tokens end before or after the answer; an answer in them is not read.
        how: ``candidates`` and ``max_new_tokens`` of the model's method.

    Returns:
        B generated texts.

    Raises:
        TypeError: if the model is not generative.
    """
    able = require(model, "generate", by=strategy)
    transform_output = None
    if strategy.overrides("transform_output"):

        def transform_output(output: Output) -> Output:
            return strategy.transform_output(model, batch, output)

    texts: list[str] = able.generate(
        batch, strategy.prompts(model, batch), transform_output=transform_output, **how
    )
    return texts


def step(model: VLM, strategy: Strategy, batch: Batch) -> StepOutput:
    """Compute the loss of a training step; the caller runs backward and the optimizer.

    Args:
        model: any VLM.
        strategy: attached to the model, with a task begun.
        batch: samples of the task, and those that the loader mixed in.

    Raises:
        RuntimeError: if no task was begun: the strategy's other hooks would not run either.
        ValueError: if two loss terms have one name.
    """
    if strategy.current_task is None:
        raise RuntimeError(
            f"{type(strategy).__name__} was given a step before begin_task: in Lightning add "
            "callbacks=[StrategyCallback()] to the Trainer, in a bare loop call "
            "mmcl.core.begin_task(model, strategy, task) first"
        )
    batch = strategy.extend_batch(model, batch)
    output = forward(model, strategy, batch)
    loss = strategy.objective(model, batch, output)
    if loss is None:
        loss = model.loss(output, batch)
    terms: dict[str, Tensor] = {"task": loss}
    for name, term in strategy.penalty(model, batch, output).items():
        if name in terms:
            raise ValueError(f"two loss terms are named '{name}': give each penalty its own name")
        terms[name] = term
        loss = loss + term
    return StepOutput(loss, terms, batch, output)


def loss_weight(batch: Batch) -> float:
    """Return the loss weight of a batch that makes the mean over ranks equal the global mean.

    A loss over classes is a mean over samples, which the loader counts. A loss over answers is a
    mean over the tokens in the loss: their counts are summed over ranks here; accumulated
    micro-batches are still weighted by their samples.
    """
    if not batch.is_generative or rank_and_world()[1] == 1:
        return batch.loss_weight
    tokens, samples = int((batch.labels != IGNORE_INDEX).sum()), batch.num_in_loss
    all_tokens, all_samples = _sums(batch, tokens, samples)
    factor = (tokens / max(1, samples)) * (all_samples / max(1, all_tokens))
    return batch.loss_weight * factor


def subset_weight(batch: Batch, count: int, samples: int, total: int | None = None) -> float:
    """Return the factor of a mean over some samples that makes it the mean of the global batch.

    The loss is multiplied by ``loss_weight(batch)``, which is right for a mean over the samples in
    the task loss. A penalty that is a mean over others, for example the new ones, is multiplied by
    this as well. All ranks must call it in the same step. A mean over samples is exact if ``total``
    is given. Else, and over tokens of answers, means are exact over ranks, and those of accumulated
    micro-batches are weighted by their samples. A batch of loss weight 0 adds nothing.

    Args:
        batch: the samples of the step.
        count: number of values in this batch's mean: its samples, or scored tokens of answers.
        samples: number of samples in this batch's mean.
        total: number of such samples in the global batch over all ranks and micro-batches; None =
            only this micro-batch's are known.
    """
    world, sizes = rank_and_world()[1], batch.global_batch
    parts = 1 if sizes is None else sizes.micro_batches
    if world * parts == 1:
        return 1.0
    weight = loss_weight(batch)
    all_counts, all_samples, all_weights = _sums(batch, count, samples, batch.loss_weight)
    if parts == 1:
        fraction = 1.0
    elif total is None:
        fraction = all_weights / (world * parts)
    else:
        fraction = all_samples / max(1, total)
    return count / max(1, all_counts) * fraction * world * parts / weight if weight else 0.0


def _sums(batch: Batch, *numbers: float) -> list[float]:
    """Return the sums of numbers over all ranks."""
    own = torch.tensor(numbers, dtype=torch.float64, device=batch.labels.device)
    sums: list[float] = all_reduce_sum(own).tolist()
    return sums


def begin_task(model: VLM, strategy: Strategy, task: Task) -> None:
    """Begin a task: run ``before_task`` and ``begin_task``, then set ``current_task``."""
    strategy.before_task(model, task)
    strategy.begin_task(model, task)
    strategy.current_task = task


def end_task(model: VLM, strategy: Strategy, task: Task, batches: Iterable[Batch]) -> None:
    """End a task: run the strategy's ``end_task`` with one exact pass over the training data.

    Args:
        model: model after the task's last step.
        strategy: attached to the model.
        task: task that ends.
        batches: this rank's samples of the training data, see ``Strategy.end_task``.
    """
    strategy.end_task(model, task, batches)
