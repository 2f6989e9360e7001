"""Strategy: the hooks of a continual-learning method; ReplayPlan: which old samples to mix in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.core.batch import Batch
from mmcl.core.model import NO_PROMPTS, VLM, Output, Prompts
from mmcl.core.task import Task

Storage = Literal["reference", "copy", "none"]
TASK_PROGRESS = "task_progress"
"""Key of the task number, and whether the task has ended (0 or 1), in a strategy's state."""


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

    Hooks run in this order: ``attach`` and ``set_memory_dir`` once; for each task ``before_task``,
    ``begin_task``, ``preview``, ``replay_plan``; for each step ``extend_batch``, ``prompts``, (the
    model), ``transform_output``, ``objective``, ``penalty``, (backward), ``project_gradients``,
    (the optimizer), ``after_step``; then ``end_task``. At test only ``prompts`` and
    ``transform_output`` run, and ``merged_adapters`` around generation.

    A hook that runs the model once more (Fisher, teacher, selection scores) calls
    ``forward(model, self.root, batch)``: so that pass has the prompts, gates and output transforms
    of all members of a chain, as the training step has.

    Attributes:
        current_task: the task in training, None before the first; set by ``mmcl.core.begin_task``.
            Its number is part of the state of the outermost strategy, as ``task_progress``.
        frozen_modules: the model's frozen modules in this task, which every step keeps in
            evaluation mode; set by ``mmcl.core.begin_task``.
        frozen_names: names of the model's parameters that ``attach`` froze, for error messages.
        is_task_ended: whether ``current_task`` has ended; set by ``mmcl.core.end_task``.
        part: name of the strategy's own parameters in ``param_groups`` of a run, None = "prompt" if
            it overrides ``prompts``, else "head".
        reads_weights: whether ``begin_task`` or ``end_task`` copies or measures the weights; a
            chain runs it after the other members, which may add or rewrite weights.
        rewrites_weights: whether ``end_task`` writes new values into weights; a chain runs it
            before the other members' ``end_task``.
    """

    current_task: Task | None = None
    frozen_modules: tuple[nn.Module, ...] = ()
    frozen_names: tuple[str, ...] = ()
    is_task_ended = False
    part: str | None = None
    reads_weights = False
    rewrites_weights = False

    def __init_subclass__(cls, **options: Any) -> None:
        """Let ``attach`` record what it freezes."""
        super().__init_subclass__(**options)
        if "attach" in vars(cls):
            cls.attach = _recording_frozen(cls.attach)  # type: ignore[method-assign, assignment]

    @property
    def root(self) -> Strategy:
        """Outermost chain that this strategy is a member of; the strategy itself without one."""
        found: Strategy = self.__dict__.get("_root", self)
        return found

    def set_root(self, root: Strategy) -> None:
        """Set ``root``; a chain calls it before ``attach``."""
        # Past nn.Module, for which the chain would be a submodule of its own member.
        self.__dict__["_root"] = root

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

    def before_task(self, model: VLM, task: Task) -> None:
        """See model and strategies as the last task left them, before any member begins the task.

        Like ``begin_task``, it is called again for every task when a checkpoint is loaded.
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

        With Lightning's precision "bf16-mixed", or ``bf16`` of transformers' Trainer, this hook
        runs under the same autocast as the steps, so that encoders give the features that they give
        in training and at test; with float16 autocast there it runs in float32, because nothing
        scales a loss here. Statistics and solves
        belong in float64, which autocast leaves alone, or inside ``torch.autocast(device_type,
        enabled=False)``. A bare loop chooses by its own context.

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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.current_task is not None and self.root is self:
            progress = [self.current_task.index, int(self.is_task_ended)]
            destination[prefix + TASK_PROGRESS] = torch.tensor(progress)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        progress = state_dict.pop(prefix + TASK_PROGRESS, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if progress is None:
            return
        index, is_ended = progress.tolist()
        for part in self.modules():
            if isinstance(part, Strategy):
                part.is_task_ended = bool(is_ended)
                if part.current_task is None or part.current_task.index != index:
                    part.current_task = Task(index, f"task {index}")

    def state_bytes(self) -> int:
        """Return the bytes that this strategy adds to a checkpoint."""
        state = {key: value for key, value in self.state_dict().items() if key != TASK_PROGRESS}
        return tensor_bytes(state, with_plain=True)


def _recording_frozen(attach: Callable[[Any, VLM], None]) -> Callable[[Any, VLM], None]:
    @wraps(attach)
    def attach_and_record(self: Any, model: VLM) -> None:
        has_names = hasattr(model, "named_parameters")  # a step refuses a model without
        before = trainable_parameters(model) if has_names else {}
        attach(self, model)
        self.frozen_names = tuple(n for n, p in before.items() if not p.requires_grad)

    return attach_and_record


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
