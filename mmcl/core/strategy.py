"""Strategy: the hooks of a continual-learning method; ReplayPlan: which old samples to mix in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.model import NO_PROMPTS, VLM, Output, Prompts
from mmcl.core.task import Task

Storage = Literal["reference", "copy", "none"]


@dataclass(frozen=True)
class ReplayPlan:
    """Stored samples to mix in, each identified by (task, sample), and their fraction of a batch.

    Attributes:
        task_ids: (R,) int64 task index of each sample.
        sample_ids: (R,) int64 number of each sample inside its task.
        replay_ratio: fraction of every global batch that is replayed, between 0 and 1: exactly
            ``round(replay_ratio * global_batch_size)`` samples, at least 1. None = every one of
            the R samples is visited once in an epoch, shuffled among the new ones (joint training).
        storage: "reference" reads the samples from the shards of their tasks, "copy" from shards
            written under the run's ``memory/``; "none" makes reading a finished task an error.

    Raises:
        ValueError: if the shapes of ``task_ids`` and ``sample_ids`` differ, or ``replay_ratio`` is
            out of range.
    """

    task_ids: Tensor
    sample_ids: Tensor
    replay_ratio: float | None = None
    storage: Storage = "reference"

    def __post_init__(self) -> None:
        if self.task_ids.shape != self.sample_ids.shape or self.task_ids.dim() != 1:
            raise ValueError(
                f"task_ids has shape {tuple(self.task_ids.shape)} and sample_ids "
                f"{tuple(self.sample_ids.shape)}: give one number of each for every sample"
            )
        if self.replay_ratio is not None and not 0 < self.replay_ratio < 1:
            raise ValueError(
                f"replay_ratio is {self.replay_ratio}, expected more than 0 and less than 1: "
                "it is the fraction of each batch that is replayed"
            )

    def __len__(self) -> int:
        """Return R, the number of samples."""
        return int(self.task_ids.shape[0])


class Strategy(nn.Module):
    """A continual-learning method as a set of hooks; every default does nothing.

    A hook acts by what it returns, never by changing its arguments. Exceptions: ``attach`` may
    freeze or rewire the model, once; ``project_gradients`` edits ``.grad``; ``end_task`` may write
    new values into trainable parameters. All state is a parameter, a buffer, or plain values and
    tensors in ``get_extra_state``, so it is part of every checkpoint.

    Hooks run in this order: ``attach`` and ``set_memory_dir`` once; for each task ``begin_task``,
    ``preview``, ``replay_plan``; for each step ``extend_batch``, ``prompts``, (the model),
    ``transform_output``, ``objective``, ``penalty``, (backward), ``project_gradients``, (the
    optimizer), ``after_step``; then ``end_task``. At test only ``prompts`` and ``transform_output``
    run, and ``merged_adapters`` around generation.

    Attributes:
        current_task: the task in training, None before the first; set by ``mmcl.core.begin_task``.
        part: name of the strategy's own parameters in ``param_groups`` of a run, None = "prompt" if
            it overrides ``prompts``, else "head".
    """

    current_task: Task | None = None
    part: str | None = None

    def attach(self, model: VLM) -> None:
        """Freeze or rewire the model and check its abilities; once, before any optimizer exists.

        Raises:
            TypeError: if the model lacks a member that the strategy needs, see ``require``.
        """

    def set_memory_dir(self, folder: Path) -> None:
        """Set the folder for files of the memory; once, before any state is loaded.

        A run passes its ``memory/``. The folder may not exist yet: a strategy that writes to it
        makes it.
        """

    def begin_task(self, model: VLM, task: Task) -> None:
        """Add or reset parameters for a task, before its optimizer is made.

        The result must depend on the task alone, because loading a checkpoint calls this hook
        again for every task up to the checkpoint's.
        """

    def preview(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """See some of a task's training data before ``replay_plan`` is called.

        Args:
            model: on its device, before the task's first step; if the task is resumed, before the
                first step after that.
            task: the task that was begun.
            batches: this rank's stride of a uniform subset of the training data; the subset is the
                same for any number of processes. Read lazily.
        """

    def replay_plan(self) -> ReplayPlan | None:
        """Return which stored samples the task's loader mixes into its batches, or None."""
        return None

    def extend_batch(self, model: VLM, batch: Batch) -> Batch:
        """Return the batch with stored samples joined, for memories that the loader cannot read.

        Args:
            model: on the batch's device.
            batch: B samples from the loader.

        Returns:
            at least B samples, those of ``batch`` first.
        """
        return batch

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Return prompt tokens and expert gates for the forward pass; also at test."""
        return NO_PROMPTS

    def transform_output(self, model: VLM, batch: Batch, output: Output) -> Output:
        """Return a transformed output, for example masked or from another head; also at test.

        Args:
            model: that made the output.
            batch: B samples.
            output: logits (B, C), or (S, V) of S token positions; at every step of generation the
                next-token scores (B, V).
        """
        return output

    def objective(self, model: VLM, batch: Batch, output: Output) -> Tensor | None:
        """Return a scalar loss that replaces ``model.loss``, or None; at most one in a chain."""
        return None

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return scalar terms to add to the loss, by the names under which they are logged."""
        return {}

    def project_gradients(self, model: VLM) -> None:
        """Edit ``.grad`` before the optimizer's step; gradients are final and unscaled."""

    def after_step(self, model: VLM, batch: Batch, output: Output) -> None:
        """Update state after the optimizer's step (fill buffers, average weights); no gradient.

        Args:
            model: after the step.
            batch: the samples of the step, replayed ones included.
            output: of the step, before the weights changed.
        """

    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Update state from one exact pass over the task's training data.

        Args:
            model: on its device, after the task's last step.
            task: the task that ends.
            batches: this rank's stride of the training data, not augmented, each sample once. Read
                lazily: a strategy that does not iterate costs nothing.
        """

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Return a context in which adapters are merged into the weights; outputs are the same.

        It is opened around generation, which is faster then. On leaving, the weights are restored
        to the bit. A strategy without adapters, or with routed ones, leaves the model as it is.
        """
        return nullcontext()

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of entries of each buffer; one that is 0 after a task is reported."""
        return {}

    def inactive_parts(self) -> tuple[str, ...]:
        """Return the parts that had no effect in the task that ended, one phrase each."""
        return tuple(
            f"{name} is empty" for name, count in self.buffer_sizes().items() if count == 0
        )

    def overrides(self, hook: str) -> bool:
        """Whether this strategy overrides a hook, given by its name."""
        return getattr(type(self), hook) is not getattr(Strategy, hook)

    def state_bytes(self) -> int:
        """Return the bytes that this strategy adds to a checkpoint."""
        return tensor_bytes(dict(self.state_dict()), with_plain=True)


def tensor_bytes(value: Any, *, with_plain: bool = False) -> int:
    """Return the bytes of all tensors in nested mappings, lists and tuples.

    Args:
        value: a tensor, or a mapping, list or tuple of them; other values count 0.
        with_plain: count plain values too: a text or bytes by its length, any other value as 8.
    """
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping | list | tuple):
        items = value.values() if isinstance(value, Mapping) else value
        return sum(tensor_bytes(item, with_plain=with_plain) for item in items)
    if not with_plain:
        return 0
    return len(value) if isinstance(value, str | bytes) else 8


def trainable_parameters(model: VLM) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of a model by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def device_of(model: VLM) -> torch.device:
    """Return the device of a model's first parameter; the CPU if it has no parameters."""
    for _, parameter in model.named_parameters():
        return parameter.device
    return torch.device("cpu")
