"""Training step, forward pass and generation: the functions in which model and strategy meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mmcl.core.batch import Batch
from mmcl.core.model import VLM, Output, require, set_frozen_to_eval
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
    for module in strategy.frozen_modules:
        if module.training:  # model.train() was called after begin_task
            module.eval()
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


def begin_task(model: VLM, strategy: Strategy, task: Task) -> None:
    """Begin a task: run the strategy's ``begin_task``, then set its ``current_task``.

    The model's frozen modules are put into evaluation mode, and stay there in every ``step``.
    """
    strategy.begin_task(model, task)
    strategy.current_task, strategy.frozen_modules = task, set_frozen_to_eval(model)


def end_task(model: VLM, strategy: Strategy, task: Task, batches: Iterable[Batch]) -> None:
    """End a task: run the strategy's ``end_task`` with one exact pass over the training data.

    Args:
        model: model after the task's last step.
        strategy: attached to the model.
        task: task that ends.
        batches: this rank's samples of the training data, see ``Strategy.end_task``.
    """
    strategy.end_task(model, task, batches)
