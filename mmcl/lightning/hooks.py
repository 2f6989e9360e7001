"""StrategyHooks: the hooks of a strategy that ``training_step`` cannot reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from mmcl.core import Batch, Step, Strategy, Task, begin_task, end_task


class StrategyHooks(pl.Callback):
    """Call ``begin_task``, ``project``, ``observe`` and ``end_task`` of ``module.strategy``.

    Works in any LightningModule that has a ``model`` and an attached ``strategy``; its
    ``training_step`` returns ``{"loss": done.loss, "step": done}``, done = ``mmcl.core.step(...)``.

    Args:
        task: what the next ``fit`` learns; None = the next number after the last one.
    """

    def __init__(self, task: Task | None = None) -> None:
        self.task = task
        self._is_closed = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimiser is built."""
        if stage == "fit":
            strategy = strategy_of(pl_module)
            begin_task(model_of(pl_module), strategy, self._next_task(trainer, strategy))
            look = getattr(pl_module, "look_what_learns", None)
            if callable(look):
                look()
            learns = any(parameter.requires_grad for parameter in pl_module.parameters())
            self._is_closed = pl_module.automatic_optimization and not learns
            if self._is_closed:
                # Closed form: a backward pass through nothing would be an error.
                pl_module.automatic_optimization = False

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the next task be stepped again, if it has something to learn."""
        if self._is_closed:
            pl_module.automatic_optimization, self._is_closed = True, False

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the strategy edit the final, unscaled gradients."""
        strategy_of(pl_module).project(model_of(pl_module))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Show the finished step to the strategy."""
        if getattr(pl_module, "learns", True) is False:
            return  # closed form: nothing is stepped, end_task does it all
        done = step_of(pl_module, outputs)
        strategy_of(pl_module).observe(model_of(pl_module), done.batch, done.output)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the strategy its exact pass over the data, while the model is on its device."""
        strategy = strategy_of(pl_module)
        if strategy.current is None:
            raise RuntimeError("the task ended before it began: pass StrategyHooks to the Trainer")
        gather = getattr(pl_module, "gather_weights", None)
        if callable(gather):
            gather()  # ranks see different samples here, so nothing may wait for a share of another
        batches = OnDevice(self._pass(trainer), pl_module.device)
        end_task(model_of(pl_module), strategy, strategy.current, batches)

    def _next_task(self, trainer: pl.Trainer, strategy: Strategy) -> Task:
        data: Any = getattr(trainer, "datamodule", None)
        if self.task is None and data is not None and hasattr(data, "begin"):
            found: Task = data.begin(trainer)
            return found
        if self.task is not None:
            return self.task
        index = 0 if strategy.current is None else strategy.current.index + 1
        return Task(index, f"task {index}")

    def _pass(self, trainer: pl.Trainer) -> Iterable[Batch]:
        data: Any = getattr(trainer, "datamodule", None)
        if data is not None and hasattr(data, "exact_pass"):
            loader: Iterable[Batch] = data.exact_pass()
            return loader
        return trainer.train_dataloader or ()


class OnDevice:
    """Batches of a loader, moved to a device as they are read."""

    def __init__(self, batches: Iterable[Batch], device: Any) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.to(self.device)

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # loaders have a length


def step_of(pl_module: pl.LightningModule, outputs: Any) -> Step:
    """Return the Step of a finished batch, from the module or from what its step returned."""
    done = getattr(pl_module, "done", None)
    if isinstance(done, Step):
        return done
    found = outputs.get("step") if isinstance(outputs, dict) else None
    if not isinstance(found, Step):
        raise RuntimeError(
            "training_step returned no Step: return {'loss': done.loss, 'step': done} with "
            "done = mmcl.core.step(self.model, self.strategy, batch)"
        )
    return found


def strategy_of(pl_module: pl.LightningModule) -> Strategy:
    """Return ``module.strategy``.

    Raises:
        TypeError: if it is missing or is no Strategy.
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
