"""Training step, forward pass and generation: the functions in which model and strategy meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcl.core.batch import Batch
from mmcl.core.model import (
    STEP_MEMBERS,
    VLM,
    MissingMembersError,
    Output,
    missing_members,
    require,
    without_adapters,
)
from mmcl.core.strategy import Strategy, trainable_parameters
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
    """Forward pass of training and inference: prompts, model, ``transform_output``.

    Raises:
        ValueError: if the model's output does not carry the prompts that the model was given.
    """
    prompts = strategy.prompts(model, batch)
    output = model(batch, prompts)
    if output.prompts is not prompts and prompts.is_given and not output.prompts.is_given:
        raise ValueError(
            f"{type(model).__name__} returned an Output without the prompts of "
            f"{type(strategy).__name__}: return Output(..., prompts=prompts) from forward(batch, "
            "prompts), after adding prompts.tokens to the tokens of its towers"
        )
    return strategy.transform_output(model, batch, output)


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
        MissingMembersError: if the model lacks a member of the protocol.
        RuntimeError: if no task was begun, as the strategy's other hooks would not run either; or
            if the loss has no gradient, see ``check_trainable``.
        ValueError: if two loss terms have one name.
    """
    if strategy.current_task is None:
        raise RuntimeError(
            f"{type(strategy).__name__} was given a step before begin_task: in Lightning add "
            "callbacks=[StrategyCallback()] to the Trainer, in a bare loop call "
            "mmcl.core.begin_task(model, strategy, task) first"
        )
    if missing := missing_members(model, STEP_MEMBERS):
        raise MissingMembersError(model, {"a training step": missing})
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
    if not loss.requires_grad and torch.is_grad_enabled():
        check_trainable(model, strategy, has_gradient=False)
    return StepOutput(loss, terms, batch, output)


def check_trainable(model: VLM, strategy: Strategy, *, has_gradient: bool = True) -> None:
    """Check that a step can train something: a parameter, or a strategy that needs none.

    A strategy that has both ``end_task`` and ``transform_output`` (RanPAC, NCM) may learn without
    a gradient.

    Args:
        model: model of the step.
        strategy: attached to the model.
        has_gradient: False = the loss of a step has no gradient, so trainable parameters, if there
            are any, take no part in it.

    Raises:
        RuntimeError: with the frozen parameters, and the strategies that froze them.
    """
    trainable = [*trainable_parameters(model)]
    trainable += [name for name, p in strategy.named_parameters() if p.requires_grad]
    if trainable and has_gradient:
        return
    parts = [part for part in strategy.modules() if isinstance(part, Strategy)]
    leaves = [part for part in parts if sum(isinstance(m, Strategy) for m in part.modules()) == 1]
    if not trainable and any(
        part.overrides("end_task") and part.overrides("transform_output") for part in leaves
    ):
        return
    names = " and ".join(type(part).__name__ for part in leaves)
    frozen = [without_adapters(n) for n, p in model.named_parameters() if not p.requires_grad]
    by = {type(part).__name__: part.frozen_names for part in leaves if part.frozen_names}
    earlier = [name for name in frozen if not any(name in its for its in by.values())]
    reasons = [f"{name} froze {_grouped(its)}" for name, its in by.items()]
    reasons += [f"{_grouped(earlier)} was frozen before"] if earlier else []
    problem = f"{names} and the model have no trainable parameter"
    if trainable:
        problem = f"the loss depends on no trainable parameter ({_grouped(trainable)} train)"
    raise RuntimeError(
        f"the loss has no gradient, because {problem}: {'; '.join(reasons) or 'nothing is frozen'}."
        " Leave a part that the loss depends on trainable (`freeze` of the model or the strategy), "
        "or add a strategy that trains something, such as LoRA or L2P"
    )


def _grouped(names: Sequence[str]) -> str:
    """Return parameter names as the modules they are in, with the number of parameters of each."""
    depth = 1
    if len({name.partition(".")[0] for name in names}) == 1:
        depth = 2  # one module around all, such as `clip`
    counts = Counter(".".join(name.split(".")[:depth]) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def begin_task(model: VLM, strategy: Strategy, task: Task) -> None:
    """Begin a task: run the strategy's ``begin_task``, then set its ``current_task``."""
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
