"""Strategy: the hooks of a continual-learning method, all optional."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.model import VLM
from mmcl.core.output import NO_PROMPTS, Output, Prompts
from mmcl.core.recall import Recall
from mmcl.core.task import Task


class Strategy(nn.Module):
    """A continual-learning method as a set of hooks; every default does nothing.

    A hook changes the world by what it returns, never by writing on its arguments. Two exceptions:
    ``attach`` may freeze or rewire the model, once, and ``project`` edits ``.grad``; ``end_task``
    may also write new weights (averaging) into trainable parameters. Everything remembered is a
    parameter, a buffer, or plain values and tensors in ``get_extra_state``.

    Hooks run in this order: ``attach`` and ``keep_in`` once; for each task ``begin_task``,
    ``preview``, ``recall``; for each step ``replay``, ``prompts``, (the model), ``refine``,
    ``objective``, ``penalty``, (backward), ``project``, (the optimiser), ``observe``; then
    ``end_task``. At test only ``prompts`` and ``refine`` run.

    Attributes:
        current: the task being learned, None before the first; set by ``mmcl.core.begin_task``.
    """

    current: Task | None = None

    def attach(self, model: VLM) -> None:
        """Freeze or rewire the model and check what it can do; before any optimiser exists."""

    def keep_in(self, folder: Path) -> None:
        """Take a folder for files of what is remembered; before anything is loaded.

        A sequence gives its run's ``memory/``. It is named here and made by whoever writes to it.
        """

    def begin_task(self, model: VLM, task: Task) -> None:
        """Grow or reset for a task, as a function of the task alone; before its optimiser."""

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """See some of a task's rows before ``recall`` is asked.

        Args:
            model: on its device, before the task's first step; of a task that goes on, at it.
            task: that was begun.
            batches: this rank's stride of a uniform part of the task's training data, which is
                the same for any number of processes; read lazily.
        """

    def recall(self) -> Recall | None:
        """Return which old samples the task's loader mixes in, or None."""
        return None

    def replay(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch with remembered rows joined."""
        return batch

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return learned tokens for the forward pass; also at test."""
        return NO_PROMPTS

    def refine(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Return another output (masked, another head); also at test."""
        return output

    def objective(self, model: VLM, batch: Batch, output: Output) -> Tensor | None:
        """Return a scalar in place of ``model.loss``, or None; one member of a chain at most."""
        return None

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return named scalar terms to add to the loss."""
        return {}

    def project(self, model: VLM) -> None:
        """Edit ``.grad``: gradients are final and unscaled, the optimiser has not stepped."""

    def observe(self, model: VLM, batch: Batch, output: Output) -> None:
        """See a finished step: fill buffers, average weights; no gradient flows."""

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Learn from one exact pass over the task's training data, on the device.

        Args:
            model: after the task's last step.
            task: the task just learned.
            batches: this rank's stride of the data, unaugmented, each sample once; read lazily,
                so a strategy that does not iterate costs nothing.
        """

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Return a context in which the model answers alike, with adapters merged into weights.

        Opened around generation, which is faster then; on leaving, the weights are as they were,
        to the bit. A strategy without adapters, or with routed ones, leaves the model as it is.
        """
        return nullcontext()

    def holdings(self) -> Mapping[str, int]:
        """Return how many entries each store holds; 0 after a task is reported as idle."""
        return {}

    def idle(self) -> tuple[str, ...]:
        """Name the parts that did nothing over the task just ended."""
        return tuple(f"{name} is empty" for name, count in self.holdings().items() if count == 0)

    def uses(self, hook: str) -> bool:
        """Tell whether this strategy has its own version of a hook."""
        return getattr(type(self), hook) is not getattr(Strategy, hook)

    def bytes_remembered(self) -> int:
        """Return the bytes that this strategy adds to a checkpoint."""
        return sum(_bytes(value) for value in self.state_dict().values())


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(item) for item in value)
    return len(value) if isinstance(value, str | bytes) else 8


def trainable(model: VLM) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that learn, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def device_of(model: VLM) -> torch.device:
    """Return the device of a model's first parameter, the CPU if it has none."""
    for _, parameter in model.named_parameters():
        return parameter.device
    return torch.device("cpu")
