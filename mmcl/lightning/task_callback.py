"""Lightning callback of one task: seeds, checkpoints, learning rate, progress and costs."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import Task, begin_task
from mmcl.core.atomic_write import WriteError
from mmcl.core.distributed import all_gather_strings
from mmcl.core.seeding import hash_seed
from mmcl.evaluation.cost import TaskCost
from mmcl.lightning.checkpoint_io import raise_on_all_ranks, warn_not_saved
from mmcl.lightning.module import ContinualModule, lr_factor
from mmcl.lightning.resume_state import set_loop_progress
from mmcl.lightning.run_dir import RunDirectory, RunState
from mmcl.lightning.strategy_callback import InactivePenaltyMonitor, StrategyCallback
from mmcl.lightning.task_checkpoints import (
    remove_mid_task_checkpoints,
    save_mid_task_checkpoint,
    save_task_checkpoint,
)

_REDRAW_SECONDS = 0.1


@dataclass
class TaskCounters:
    """Counters of a task's cost so far, stored in its mid-task checkpoints."""

    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    flops_per_sample: float = 0.0
    errors: list[str] = field(default_factory=list)


class TaskCallback(StrategyCallback):
    """Callback that begins a task, seeds and counts its steps, saves checkpoints and ends it.

    One callback does all of it, because Lightning's overhead per step grows with their number.

    Args:
        task: the task in training.
        folder: run directory.
        state: state of the run; updated and written during the task.
        seed: seed of the run.
        checkpoint_every_n_steps: optimizer steps between two mid-task checkpoints, 0 = none.
        max_bad_fraction: fraction of the task's samples that may be unreadable.
    """

    task: Task

    # Lightning skips a hook that is None; an empty one costs a profiler context per step.
    on_before_zero_grad = on_before_backward = on_after_backward = None  # type: ignore[assignment]

    def __init__(
        self,
        task: Task,
        folder: RunDirectory,
        state: RunState,
        *,
        seed: int,
        checkpoint_every_n_steps: int,
        max_bad_fraction: float,
    ) -> None:
        super().__init__(task)
        self.folder, self.state, self.seed = folder, state, seed
        self.checkpoint_every_n_steps, self.max_bad_fraction = (
            checkpoint_every_n_steps,
            max_bad_fraction,
        )
        self.counts = TaskCounters()
        self.alarm = InactivePenaltyMonitor()
        self.warnings: list[str] = []
        self.unsaved = 0
        self.parameters_before = 0
        self._counter: FlopCounterMode | None = None
        self._line: ProgressLine | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimizer is built."""
        if stage == "fit":
            module = _continual_module(pl_module)
            self.parameters_before = sum(p.numel() for p in module.parameters())
            begin_task(module.model, module.strategy, self.task)
            module.update_trainable()
            if not module.has_trainable:
                # Closed form: end_task does it all, but Lightning needs one step for a fit.
                trainer.fit_loop.max_epochs, trainer.limit_train_batches = 1, 1
            data = trainer.datamodule  # type: ignore[attr-defined]
            data.set_model_classes(module.model)
            self._overrides = {
                hook: module.strategy.overrides(hook)
                for hook in ("project_gradients", "after_step")
            }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the progress line."""
        module = _continual_module(pl_module)
        accumulation = trainer.accumulate_grad_batches
        self.steps = (
            int(trainer.num_training_batches) // accumulation * int(trainer.max_epochs or 1)
        )
        self.step = self.counts.steps
        self._base_rates = [
            (group, group.get("initial_lr", group["lr"]))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        for group, rate in self._base_rates:
            group["initial_lr"] = rate
        self._has_schedule = module.warmup_steps > 0 or module.lr_schedule != "constant"
        self._rank, self._is_on_gpu = trainer.global_rank, module.device.type == "cuda"
        every: int = vars(trainer).get("log_every_n_steps", 50)
        self._log_every = every if trainer.loggers else 0
        title = f"task {self.task.index}: {self.task.name}"
        self._line = ProgressLine(title, self.steps, is_shown=trainer.is_global_zero)
        self._clock = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch, so that a step's dropout is a function of seed, task, step and rank."""
        seed = hash_seed(self.seed, self.task.index, trainer.fit_loop.total_batch_idx, self._rank)
        torch.default_generator.manual_seed(seed)
        if self._is_on_gpu:
            torch.cuda.manual_seed(seed)
        if self.step == 0 and self.counts.flops_per_sample == 0 and self.folder.writes:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the strategy project the gradients, and set the learning rate of this step."""
        module = _continual_module(pl_module)
        if self._overrides["project_gradients"]:
            module.strategy.project_gradients(module.model)
        if self._has_schedule:
            factor = lr_factor(self.step, self.steps, module.warmup_steps, module.lr_schedule)
            for group, rate in self._base_rates:
                group["lr"] = rate * factor
        self.step += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Pass the step to the strategy, count it, and save a checkpoint if one is due."""
        module, counts, samples = _continual_module(pl_module), self.counts, len(batch)
        self._stop_flop_counter(samples)
        counts.rows += samples
        done = module.last_step
        if done is not None:
            self.alarm.update(done.terms)
            if self._overrides["after_step"]:
                module.strategy.after_step(module.model, done.batch, done.output)
        if batch.errors:
            self._add_errors(batch.errors)
        if self._line is not None and self._line.wants() and outputs is not None:
            self._line.show(self.step, float(outputs["loss"]))
        if self.step == counts.steps:
            return
        counts.steps = self.step
        if self._log_every and self.step % self._log_every == 0 and done is not None:
            self._log(trainer, done.terms)
        every = self.checkpoint_every_n_steps
        # The last step is never saved: a resumed task must have a step left, because Lightning
        # calls on_train_end, where the strategy ends the task, only after one.
        if every and self.step % every == 0 and self.step < self.steps:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task and write its checkpoint."""
        module = _continual_module(pl_module)
        if self._line is not None:
            self._line.close()
        super().on_train_end(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with raise_on_all_ranks(trainer):
            if self.folder.writes:
                data.save_replay_copies(module.strategy.replay_plan(), self.task.index)
        self._update_seconds()
        # Each rank has its own bad samples; all of them are counted and named.
        self._add_errors(tuple(all_gather_strings(self.counts.errors, module.device)))
        self.warnings = self.alarm.messages(module.strategy, self.task.name)
        if self.unsaved:
            problem = f"{self.unsaved} of its mid-task checkpoints could not be written"
            self.warnings.append(f"task '{self.task.name}': {problem}")
        self.cost = self._cost(trainer, module)
        save_task_checkpoint(trainer, module, self.folder.task_checkpoint(self.task.index + 1))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the progress line."""
        self._stop_flop_counter(0)
        if self._line is not None:
            self._line.close()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Correct Lightning's loop progress, which can be wrong in a resumed run."""
        if "loops" in checkpoint:
            set_loop_progress(
                checkpoint["loops"]["fit_loop"],
                done=trainer.fit_loop.total_batch_idx + 1,
                an_epoch=int(trainer.num_training_batches),
                accumulation=trainer.accumulate_grad_batches,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the task's counters and the state of its penalty monitor."""
        self._update_seconds()
        counts = {**vars(self.counts), "errors": list(self.counts.errors)}
        return {"counts": counts, "alarm": self.alarm.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the counters and the penalty monitor."""
        self.counts = TaskCounters(**state_dict["counts"])
        self.alarm.load(state_dict["alarm"])

    def _save(self, trainer: pl.Trainer) -> None:
        try:
            last = save_mid_task_checkpoint(trainer, self.folder.last.parent, self.step)
            self.state.last_checkpoint, self.state.step = f"checkpoints/{last.name}", self.step
            self.folder.save(self.state)
            if self.folder.writes:
                remove_mid_task_checkpoints(last.parent, but=last)
        except WriteError as error:
            # Steps are lost only if the run ends before the next checkpoint.
            self.unsaved += 1
            warn_not_saved(
                f"step {self.step} of task {self.task.index}", error, self.folder.state()
            )

    def _add_errors(self, errors: tuple[str, ...]) -> None:
        known = self.counts.errors
        known += [error for error in errors if error not in known]
        allowed = self.max_bad_fraction * max(1, self.task.size)
        if len(known) > allowed:
            named = "; ".join(known[:5])
            raise ValueError(
                f"{len(known)} samples of task '{self.task.name}' cannot be read, more than "
                f"data.max_bad_fraction={self.max_bad_fraction:g} of {self.task.size} allows: "
                f"{named}"
            )

    def _stop_flop_counter(self, samples: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if samples:
                self.counts.flops_per_sample = self._counter.get_total_flops() / samples
            self._counter = None

    def _log(self, trainer: pl.Trainer, terms: Any) -> None:
        values = {f"train/{name}": float(term) for name, term in terms.items()}
        values["train/learning_rate"] = float(self._base_rates[0][0]["lr"])
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.state.step_offset(self.step))

    def _update_seconds(self) -> None:
        now = time.monotonic()
        self.counts.seconds += now - self._clock
        self._clock = now

    def _cost(self, trainer: pl.Trainer, module: ContinualModule) -> TaskCost:
        counts, world = self.counts, trainer.world_size
        samples = counts.rows * world
        new = (
            min(samples, self.task.size * int(trainer.max_epochs or 1))
            if module.has_trainable
            else 0
        )
        trainable = (
            [p for p in module.parameters() if p.requires_grad] if module.has_trainable else []
        )
        return TaskCost(
            task=self.task.name,
            seconds=round(counts.seconds, 3),
            steps=counts.steps if module.has_trainable else 0,
            samples_new=new,
            samples_replayed=samples - new if module.has_trainable else 0,
            flops=counts.flops_per_sample * samples if module.has_trainable else None,
            peak_memory_bytes=peak_memory(module.device),
            trainable_parameters=sum(p.numel() for p in trainable),
            parameters_added=sum(p.numel() for p in module.parameters()) - self.parameters_before,
            state_bytes=module.strategy.state_bytes(),
        )


def _continual_module(pl_module: pl.LightningModule) -> ContinualModule:
    if not isinstance(pl_module, ContinualModule):
        raise TypeError(
            f"a run needs a ContinualModule and got {type(pl_module).__name__}: use "
            "StrategyCallback "
            "with your own LightningModule"
        )
    return pl_module


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the device so far in bytes, or on a CPU of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ProgressLine:
    """Progress line of a task, redrawn at most ten times a second; nothing without a terminal.

    Args:
        title: text before the bar.
        steps: total number of steps.
        is_shown: False on ranks other than 0.
    """

    def __init__(self, title: str, steps: int, is_shown: bool) -> None:
        self._next_draw = 0.0
        self._bar: Progress | None = None
        self._line: TaskID | None = None
        if is_shown and Console(stderr=True).is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._line = self._bar.add_task(title, total=steps, loss="")
            self._bar.start()

    def wants(self) -> bool:
        """Return whether the line is due to be drawn."""
        return self._bar is not None and time.monotonic() >= self._next_draw

    def show(self, step: int, loss: float) -> None:
        """Draw the line."""
        if self._bar is not None and self._line is not None:
            self._next_draw = time.monotonic() + _REDRAW_SECONDS
            self._bar.update(self._line, completed=step, loss=f"loss {loss:.3f}", refresh=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
