"""Lightning callback that calls a strategy's hooks, and a monitor for inactive penalties."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from mmcl.core import Batch, StepOutput, Strategy, Task, begin_task, begin_tasks, end_task
from mmcl.core.distributed import rank_and_world
from mmcl.core.model import frozen_modules
from mmcl.core.step import check_trainable
from mmcl.core.strategy import TASK_PROGRESS
from mmcl.data import ImageCaptionCollate, ImageLabelCollate, TaskPass
from mmcl.lightning.config.trainer_settings import check_precision

EVAL_MODE_WARNING = ".* in eval mode at the start of training"
"""Lightning's warning of modules in evaluation mode, which frozen ones are on purpose."""
_BUFFERED_STEPS = 64
"""Steps between two reads of the penalty values: each read waits for the device."""


class StrategyCallback(pl.Callback):
    """Callback that runs a strategy's hooks around the tasks and steps of a Lightning fit.

    Works in any LightningModule that has a ``model`` and an attached ``strategy``; its
    ``training_step`` returns ``{"loss": done.loss, "step": done}``, done = ``mmcl.core.step(...)``.
    Every task takes a new Trainer with a new callback.

    Tasks are numbered by themselves: the strategy's state holds the number, so the next ``fit``
    has the next number after a checkpoint was loaded into a new module. ``fit(ckpt_path=...)``
    resumes the task of the checkpoint.

    ``end_task`` is given the task's own samples, each once: those of ``task_loader``, else of the
    training loader's dataset that its sampler chooses, in order, without shuffle, ``drop_last``
    and samples marked as replayed. Parts of the strategy that had no effect are warned of by name.

    Args:
        task: the task of the next ``fit``; None = the next number after the last one.
        task_loader: loader of the task's own samples in the dataset's order, each once and without
            augmentation; on several devices, this rank's stride of them.
        eval_collate_fn: collate function without augmentation for the pass over the training
            loader's dataset; not needed by ``ImageLabelCollate``, ``ImageCaptionCollate`` and
            ``replay_loader``.
    """

    ends_without_steps = True

    def __init__(
        self,
        task: Task | None = None,
        task_loader: Iterable[Batch] | None = None,
        eval_collate_fn: Callable[[list[Any]], Batch] | None = None,
    ) -> None:
        self.task, self.task_loader, self.eval_collate_fn = task, task_loader, eval_collate_fn
        self.alarm = InactivePenaltyMonitor()
        self._is_closed_form = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimizer is built.

        Raises:
            RuntimeError: if the Trainer has trained a task before, or nothing is trainable.
            ValueError: if the Trainer's precision converts all state, such as "bf16-true"; later,
                if ``fit`` was given the checkpoint of a task that has ended.
        """
        if stage != "fit":
            return
        check_precision(trainer)
        if vars(trainer).get("_has_ended_task"):
            raise RuntimeError(
                "this Trainer has trained a task before and would count on: make a new pl.Trainer "
                "for every task"
            )
        model, strategy = model_of(pl_module), strategy_of(pl_module)
        is_new = strategy.current_task is None
        task = self._next_task(trainer, strategy)
        begin_stage = getattr(pl_module, "begin_stage", None)
        if callable(begin_stage):
            begin_stage(task.stage)
        begin_task(model, strategy, task)
        if not hasattr(getattr(trainer, "datamodule", None), "start_task"):
            _before_load(pl_module, partial(_begin_tasks_of_checkpoint, model, strategy, is_new))
        update_trainable = getattr(pl_module, "update_trainable", None)
        if callable(update_trainable):
            update_trainable()
        has_trainable = any(p.requires_grad for p in pl_module.parameters())
        if not has_trainable:
            check_trainable(model, strategy)
        self._is_closed_form = pl_module.automatic_optimization and not has_trainable
        if self._is_closed_form:
            # A closed-form strategy has no graph: a backward pass would be an error.
            pl_module.automatic_optimization = False
        frozen = {m for part in frozen_modules(pl_module) for m in part.modules()}
        if all(module.training or module in frozen for module in pl_module.modules()):
            warnings.filterwarnings("ignore", EVAL_MODE_WARNING)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """End the task if Lightning did not, and restore what was set for this fit.

        A fit that resumes from a checkpoint of its last step has no step left, so Lightning skips
        ``on_train_end``.
        """
        if stage == "fit" and self.ends_without_steps and not vars(trainer).get("_has_ended_task"):
            self.on_train_end(trainer, pl_module)
        if self._is_closed_form:
            pl_module.automatic_optimization, self._is_closed_form = True, False
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the strategy project the final, unscaled gradients."""
        strategy_of(pl_module).project_gradients(model_of(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Pass the finished step to the strategy."""
        if getattr(pl_module, "has_trainable", True) is False:
            return  # closed form: there are no steps, end_task does it all
        done = step_of(pl_module, outputs)
        self.alarm.update(done.terms)
        strategy_of(pl_module).after_step(model_of(pl_module), done.batch, done.output)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task, and warn of parts of the strategy that had no effect in it."""
        self.run_end_task(trainer, pl_module)
        strategy = strategy_of(pl_module)
        if strategy.current_task is not None:
            for sentence in self.alarm.messages(strategy, strategy.current_task.name):
                warnings.warn(sentence, stacklevel=2)

    def run_end_task(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task with the strategy's exact pass over its data, on the model's device."""
        strategy = strategy_of(pl_module)
        if strategy.current_task is None:
            raise RuntimeError(
                "the task ended before it began: pass StrategyCallback to the Trainer"
            )
        gather = getattr(pl_module, "unshard_weights", None)
        if callable(gather):
            gather()  # ranks see different samples here, so none may wait for shards of another
        batches = self._pass(trainer, pl_module)
        with end_task_precision(trainer, pl_module.device.type):
            end_task(model_of(pl_module), strategy, strategy.current_task, batches)
        vars(trainer)["_has_ended_task"] = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the monitor of inactive penalties."""
        return {"alarm": self.alarm.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the monitor."""
        self.alarm.load(state_dict["alarm"])

    def _next_task(self, trainer: pl.Trainer, strategy: Strategy) -> Task:
        if self.task is not None:
            return self.task
        start_task: Any = getattr(getattr(trainer, "datamodule", None), "start_task", None)
        if start_task is not None:
            found: Task = start_task(trainer)
            return found
        last = strategy.current_task
        index = 0 if last is None else last.index + strategy.is_task_ended
        return Task(index, f"task {index}")

    def _pass(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Batch]:
        """Return this rank's batches of the task's own samples."""
        if self.task_loader is not None:
            return self.task_loader
        task_pass: Any = getattr(getattr(trainer, "datamodule", None), "task_pass", None)
        loader: Any = trainer.train_dataloader
        if task_pass is None:
            task_pass = getattr(loader, "task_pass", None)
        if task_pass is not None:
            batches: Iterable[Batch] = task_pass()
            return batches
        return self._pass_over(loader, pl_module)

    def _pass_over(self, loader: Any, pl_module: pl.LightningModule) -> Iterable[Batch]:
        """Return a pass in order over the dataset of a DataLoader of the user's."""
        dataset: Any = getattr(loader, "dataset", loader)
        batch_size = getattr(loader, "batch_size", None)
        if isinstance(dataset, list | tuple) and batch_size is None:
            rank, world = rank_and_world()
            return dataset[rank::world]  # of batches
        is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        is_known, indices = _sampled_indices(loader) if is_map_style else (False, None)
        if batch_size is None or not is_known:
            return _Doubtful(
                () if loader is None else loader,
                "the training loader has no map-style dataset and batch_size, or a sampler of its "
                "own, so end_task sees the samples of one more epoch, in its order and augmented",
            )
        task = strategy_of(pl_module).current_task
        collate = self.eval_collate_fn or _without_augmentation(loader, model_of(pl_module))
        found = TaskPass(
            dataset, collate or loader.collate_fn, batch_size,
            task=0 if task is None else task.index, num_workers=loader.num_workers, indices=indices,
        )  # fmt: skip
        if collate is not None:
            return found
        return _Doubtful(
            found, "end_task sees samples as the training loader's collate_fn makes them: if that "
            "or the dataset augments, they are augmented",
        )  # fmt: skip


def _sampled_indices(loader: Any) -> tuple[bool, list[int] | None]:
    """Return whether it is known which samples a DataLoader visits, and which; None = all.

    On several devices Lightning wraps a sampler of the user's, whose samples are meant.
    """
    sampler: Any = getattr(loader, "sampler", None)
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    sampler = sampler if wrapped is None else wrapped
    if isinstance(sampler, SubsetRandomSampler):
        return True, sorted({int(index) for index in sampler.indices})
    if isinstance(sampler, RandomSampler):
        return sampler.num_samples == len(loader.dataset) and not sampler.replacement, None
    return isinstance(sampler, SequentialSampler | DistributedSampler), None


def _before_load(pl_module: Any, prepare: Callable[[Mapping[str, Any]], None]) -> None:
    """Let ``prepare`` see a checkpoint before the module's weights are loaded from it.

    Lightning calls a callback's hook after that, and the module's own before.
    """
    own = pl_module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        prepare(checkpoint)
        own(checkpoint)

    vars(pl_module)["on_load_checkpoint"] = on_load_checkpoint


def _begin_tasks_of_checkpoint(
    model: Any, strategy: Strategy, is_new: bool, checkpoint: Mapping[str, Any]
) -> None:
    """Begin the tasks up to that of a mid-task checkpoint, so that what they added exists.

    Raises:
        ValueError: if the checkpoint's task has ended, or is another than the one that was begun.
    """
    state = checkpoint.get("state_dict", {})
    found = [value for key, value in state.items() if key.endswith(f".{TASK_PROGRESS}")]
    if not found or strategy.current_task is None:
        return
    index, is_ended = found[0].tolist()
    if is_ended:
        raise ValueError(
            f"the checkpoint of ckpt_path was written when task {index} had ended, and ckpt_path "
            "continues a task: for the next one call mmcl.begin_tasks(module.model, "
            "module.strategy, state) and module.load_state_dict(state), state being the "
            "checkpoint's 'state_dict', and leave ckpt_path out"
        )
    if is_new:
        task = strategy.current_task
        begin_tasks(model, strategy, state)
        if task.index == index:
            strategy.current_task = task  # with the name that was given
    elif strategy.current_task.index != index:
        raise ValueError(
            f"the checkpoint of ckpt_path is of task {index} and this module is in task "
            f"{strategy.current_task.index}: load it into a new module"
        )


def _without_augmentation(loader: Any, model: Any) -> Callable[[list[Any]], Batch] | None:
    """Return the collate function of a loader without augmentation, None if that is not known."""
    collate = getattr(loader, "collate_fn", None)
    if isinstance(collate, ImageLabelCollate | ImageCaptionCollate) and hasattr(model, "transform"):
        return replace(collate, transform=model.transform(False))
    return None


class _Doubtful:
    """Iterable over a pass that may not be exact: says so once, when it is read."""

    _warned_of: ClassVar[set[str]] = set()

    def __init__(self, batches: Iterable[Batch], problem: str) -> None:
        self.batches, self.problem = batches, problem

    def __iter__(self) -> Iterator[Batch]:
        if self.problem not in self._warned_of:
            self._warned_of.add(self.problem)
            warnings.warn(
                f"{self.problem}: give StrategyCallback a task_loader, or eval_collate_fn",
                stacklevel=2,
            )
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # loaders have a length


@contextmanager
def end_task_precision(trainer: pl.Trainer, device_type: str) -> Iterator[None]:
    """Enter the autocast of precision "bf16-mixed" for ``end_task``; else change nothing.

    Lightning calls ``on_train_end`` outside of autocast. "16-mixed" stays in float32, because
    gradients of an unscaled loss, such as the Fisher information's, would underflow.
    """
    is_bf16 = trainer.precision == "bf16-mixed"
    # Cached casts would be stale after a strategy wrote new weights.
    with torch.autocast(device_type, torch.bfloat16, enabled=is_bf16, cache_enabled=False):
        yield


class OnDevice:
    """Iterable over the batches of a loader, each moved to a device as it is read."""

    def __init__(self, batches: Iterable[Batch], device: Any) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.to(self.device)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # loaders have a length


def step_of(pl_module: pl.LightningModule, outputs: Any) -> StepOutput:
    """Return the StepOutput of a batch, from ``module.last_step`` or the output of its step."""
    done = getattr(pl_module, "last_step", None)
    if isinstance(done, StepOutput):
        return done
    found = outputs.get("step") if isinstance(outputs, dict) else None
    if not isinstance(found, StepOutput):
        raise RuntimeError(
            "training_step returned no Step: return {'loss': done.loss, 'step': done} with "
            "done = mmcl.core.step(self.model, self.strategy, batch)"
        )
    return found


def strategy_of(pl_module: pl.LightningModule) -> Strategy:
    """Return ``module.strategy``.

    Raises:
        TypeError: if it is missing or not a Strategy.
    """
    strategy = getattr(pl_module, "strategy", None)
    if not isinstance(strategy, Strategy):
        raise TypeError(
            f"{type(pl_module).__name__}.strategy is {type(strategy).__name__}: set self.strategy "
            "to a mmcl Strategy and call self.strategy.attach(self.model) in __init__"
        )
    return strategy


def model_of(pl_module: pl.LightningModule) -> Any:
    """Return ``module.model``.

    Raises:
        TypeError: if it is missing.
    """
    model = getattr(pl_module, "model", None)
    if model is None:
        raise TypeError(f"{type(pl_module).__name__} has no model: set self.model to a VLM")
    return model


class InactivePenaltyMonitor:
    """Monitor of the penalty terms of one task, each until it was active once.

    A term is inactive if on no step it was both connected to the graph and different from zero.
    """

    def __init__(self) -> None:
        self._active: set[str] = set()
        self._connected: set[str] = set()
        self._buffered: dict[str, list[Tensor]] = {}

    def update(self, terms: Mapping[str, Tensor]) -> None:
        """Record the loss terms of a step; waits for the device at most once in 64 steps."""
        if len(terms) == 1:
            return
        for name, term in terms.items():
            if name == "task" or name in self._active:
                continue
            values = self._buffered.setdefault(name, [])
            if term.requires_grad:
                self._connected.add(name)
                values.append(term.detach())
            if len(values) == _BUFFERED_STEPS:
                self._flush(name)

    def messages(self, strategy: Strategy, task: str) -> list[str]:
        """Return one warning for each component of the strategy that was inactive over the task."""
        name = type(strategy).__name__
        inactive = []
        for term in self._buffered:
            self._flush(term)
            if term not in self._active:
                is_connected = term in self._connected
                why = "was 0 on every step" if is_connected else "has no gradient"
                inactive.append(f"penalty '{term}' {why}")
        inactive += [str(part) for part in strategy.inactive_parts()]
        return [f"{name} has an inactive part in task '{task}': {reason}" for reason in inactive]

    def state(self) -> dict[str, list[str]]:
        """Return the state of the monitor for a mid-task checkpoint."""
        for term in self._buffered:
            self._flush(term)
        return {
            "terms": sorted(self._buffered),
            "connected": sorted(self._connected),
            "active": sorted(self._active),
        }

    def load(self, state: Mapping[str, Sequence[str]]) -> None:
        """Load the state of a mid-task checkpoint."""
        self._buffered = {term: [] for term in state["terms"]}
        self._connected, self._active = set(state["connected"]), set(state["active"])

    def _flush(self, name: str) -> None:
        """Mark a term as active if a buffered value is not 0, and clear the buffer."""
        values = self._buffered[name]
        if values and float(torch.stack(values).abs().max()) > 0:
            self._active.add(name)
        values.clear()
