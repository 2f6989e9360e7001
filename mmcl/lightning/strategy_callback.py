"""Lightning callback that calls a strategy's hooks, and a monitor for inactive penalties."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from mmcl.core import Batch, StepOutput, Strategy, Task, begin_task, end_task
from mmcl.core.model import frozen_modules

EVAL_MODE_WARNING = ".* in eval mode at the start of training"
"""Lightning's warning of modules in evaluation mode, which frozen ones are on purpose."""
_BUFFERED_STEPS = 64
"""Steps between two reads of the penalty values: each read waits for the device."""


class StrategyCallback(pl.Callback):
    """Callback that runs a strategy's hooks around the tasks and steps of a Lightning fit.

    Works in any LightningModule that has a ``model`` and an attached ``strategy``; its
    ``training_step`` returns ``{"loss": done.loss, "step": done}``, done = ``mmcl.core.step(...)``.

    Args:
        task: the task of the next ``fit``; None = the next number after the last one.
    """

    def __init__(self, task: Task | None = None) -> None:
        self.task = task
        self._is_closed_form = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimizer is built."""
        if stage == "fit":
            strategy = strategy_of(pl_module)
            begin_task(model_of(pl_module), strategy, self._next_task(trainer, strategy))
            update_trainable = getattr(pl_module, "update_trainable", None)
            if callable(update_trainable):
                update_trainable()
            has_trainable = any(p.requires_grad for p in pl_module.parameters())
            self._is_closed_form = pl_module.automatic_optimization and not has_trainable
            if self._is_closed_form:
                # A closed-form strategy has no graph: a backward pass would be an error.
                pl_module.automatic_optimization = False
            frozen = {m for part in frozen_modules(pl_module) for m in part.modules()}
            if all(module.training or module in frozen for module in pl_module.modules()):
                warnings.filterwarnings("ignore", EVAL_MODE_WARNING)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore automatic optimization, for the next task may have trainable parameters."""
        if self._is_closed_form:
            pl_module.automatic_optimization, self._is_closed_form = True, False

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
        strategy_of(pl_module).after_step(model_of(pl_module), done.batch, done.output)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task with the strategy's exact pass over its data, on the model's device."""
        strategy = strategy_of(pl_module)
        if strategy.current_task is None:
            raise RuntimeError(
                "the task ended before it began: pass StrategyCallback to the Trainer"
            )
        gather = getattr(pl_module, "unshard_weights", None)
        if callable(gather):
            gather()  # ranks see different samples here, so none may wait for shards of another
        batches = OnDevice(self._pass(trainer), pl_module.device)
        with end_task_precision(trainer, pl_module.device.type):
            end_task(model_of(pl_module), strategy, strategy.current_task, batches)

    def _next_task(self, trainer: pl.Trainer, strategy: Strategy) -> Task:
        if self.task is not None:
            return self.task
        start_task: Any = getattr(getattr(trainer, "datamodule", None), "start_task", None)
        if start_task is not None:
            found: Task = start_task(trainer)
            return found
        index = 0 if strategy.current_task is None else strategy.current_task.index + 1
        return Task(index, f"task {index}")

    def _pass(self, trainer: pl.Trainer) -> Iterable[Batch]:
        task_pass: Any = getattr(getattr(trainer, "datamodule", None), "task_pass", None)
        return trainer.train_dataloader or () if task_pass is None else task_pass()


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
