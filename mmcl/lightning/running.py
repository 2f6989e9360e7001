"""TaskHooks: all that happens around the steps of one task of a sequence."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import Task, begin_task
from mmcl.core.atomic import CannotWrite
from mmcl.core.distributed import gather_texts
from mmcl.core.randomness import mix
from mmcl.lightning.alarm import Alarm
from mmcl.lightning.checkpoint_file import all_or_none, warn_unsaved
from mmcl.lightning.folder import RunFolder, RunState
from mmcl.lightning.hooks import StrategyHooks
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.progress import ProgressLine
from mmcl.lightning.schedule import rate_factor
from mmcl.lightning.sharing import forget_inside, save_after, save_inside
from mmcl.lightning.standing import stand_at
from mmcl.metrics.cost import TaskCost


@dataclass
class Counts:
    """What a task has cost so far; goes into its mid-task checkpoint."""

    seconds: float = 0.0
    steps: int = 0
    rows: int = 0
    flops_a_row: float = 0.0
    faults: list[str] = field(default_factory=list)


class TaskHooks(StrategyHooks):
    """Begin a task, seed its steps, save it every so often, end it, and count what it cost.

    Everything hangs on one callback because Lightning's own cost of a step grows with their number.

    Args:
        task: what is learned.
        folder: of the run.
        state: of the run; changed and written as the task proceeds.
        seed: of the run.
        save_every_steps: optimiser steps between two mid-task checkpoints, 0 = none.
        max_faults: share of the task's samples that may be unreadable.
    """

    task: Task

    # Lightning skips a hook that is None; one that does nothing costs a profiler's context a step.
    on_before_zero_grad = on_before_backward = on_after_backward = None  # type: ignore[assignment]

    def __init__(
        self,
        task: Task,
        folder: RunFolder,
        state: RunState,
        *,
        seed: int,
        save_every_steps: int,
        max_faults: float,
    ) -> None:
        super().__init__(task)
        self.folder, self.state, self.seed = folder, state, seed
        self.save_every_steps, self.max_faults = save_every_steps, max_faults
        self.counts = Counts()
        self.alarm = Alarm()
        self.warnings: list[str] = []
        self.unsaved = 0
        self.parameters_before = 0
        self._counter: FlopCounterMode | None = None
        self._line: ProgressLine | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimiser is built."""
        if stage == "fit":
            module = _ours(pl_module)
            self.parameters_before = sum(p.numel() for p in module.parameters())
            begin_task(module.model, module.strategy, self.task)
            module.look_what_learns()
            if not module.learns:
                # Closed form: end_task does it all, and a fit without a step is none to Lightning.
                trainer.fit_loop.max_epochs, trainer.limit_train_batches = 1, 1
            data = trainer.datamodule  # type: ignore[attr-defined]
            data.show_classes(module.model)
            self._uses = {hook: module.strategy.uses(hook) for hook in ("project", "observe")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the progress line."""
        module = _ours(pl_module)
        parts = trainer.accumulate_grad_batches
        self.steps = int(trainer.num_training_batches) // parts * int(trainer.max_epochs or 1)
        self.step = self.counts.steps
        self._group_rates = [
            (group, group.get("initial_lr", group["lr"]))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        for group, rate in self._group_rates:
            group["initial_lr"] = rate
        self._rate_moves = module.warmup > 0 or module.schedule != "constant"
        self._rank, self._is_on_gpu = trainer.global_rank, module.device.type == "cuda"
        every: int = vars(trainer).get("log_every_n_steps", 50)
        self._log_every = every if trainer.loggers else 0
        title = f"task {self.task.index}: {self.task.name}"
        self._line = ProgressLine(title, self.steps, is_shown=trainer.is_global_zero)
        self._clock = time.monotonic()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Reset torch's generator, so that a step's dropout is a function of where it stands."""
        seed = mix(self.seed, self.task.index, trainer.fit_loop.total_batch_idx, self._rank)
        torch.default_generator.manual_seed(seed)
        if self._is_on_gpu:
            torch.cuda.manual_seed(seed)
        if self.step == 0 and self.counts.flops_a_row == 0 and self.folder.writes:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()  # type: ignore[no-untyped-call]

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Let the strategy edit the gradients, and set the learning rate of this step."""
        module = _ours(pl_module)
        if self._uses["project"]:
            module.strategy.project(module.model)
        if self._rate_moves:
            factor = rate_factor(self.step, self.steps, module.warmup, module.schedule)
            for group, rate in self._group_rates:
                group["lr"] = rate * factor
        self.step += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Show the step to the strategy, count it, and save the task when it is time."""
        module, counts, rows = _ours(pl_module), self.counts, len(batch)
        self._stop_counting(rows)
        counts.rows += rows
        done = module.done
        if done is not None:
            self.alarm.see(done.terms)
            if self._uses["observe"]:
                module.strategy.observe(module.model, done.batch, done.output)
        if batch.faults:
            self._note(batch.faults)
        if self._line is not None and self._line.wants() and outputs is not None:
            self._line.show(self.step, float(outputs["loss"]))
        if self.step == counts.steps:
            return
        counts.steps = self.step
        if self._log_every and self.step % self._log_every == 0 and done is not None:
            self._log(trainer, done.terms)
        every = self.save_every_steps
        # The last step is never saved: a task that goes on must have a step left, for Lightning
        # calls on_train_end, where the strategy learns, only after one.
        if every and self.step % every == 0 and self.step < self.steps:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task and keep its checkpoint; from here on it is learned."""
        module = _ours(pl_module)
        if self._line is not None:
            self._line.close()
        super().on_train_end(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with all_or_none(trainer):
            if self.folder.writes:
                data.keep(module.strategy.recall(), self.task.index)
        self._tick()
        # Each rank has met its own bad samples; all of them are counted and named.
        self._note(tuple(gather_texts(self.counts.faults, module.device)))
        self.warnings = self.alarm.report(module.strategy, self.task.name)
        if self.unsaved:
            times = f"{self.unsaved} of its mid-task checkpoints could not be written"
            self.warnings.append(f"task '{self.task.name}': {times}")
        self.cost = self._cost(trainer, module)
        save_after(trainer, module, self.folder.after(self.task.index + 1))

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back."""
        self._stop_counting(0)
        if self._line is not None:
            self._line.close()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put Lightning's progress right, which a resumed run may have wrong."""
        if "loops" in checkpoint:
            stand_at(
                checkpoint["loops"]["fit_loop"],
                done=trainer.fit_loop.total_batch_idx + 1,
                an_epoch=int(trainer.num_training_batches),
                accumulation=trainer.accumulate_grad_batches,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what the task has cost so far, and what was seen of its penalties."""
        self._tick()
        counts = {**vars(self.counts), "faults": list(self.counts.faults)}
        return {"counts": counts, "alarm": self.alarm.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting and watching."""
        self.counts = Counts(**state_dict["counts"])
        self.alarm.load(state_dict["alarm"])

    def _save(self, trainer: pl.Trainer) -> None:
        try:
            last = save_inside(trainer, self.folder.last.parent, self.step)
            self.state.last, self.state.step = f"checkpoints/{last.name}", self.step
            self.folder.save(self.state)
            if self.folder.writes:
                forget_inside(last.parent, but=last)
        except CannotWrite as error:
            # Only a run that ends before the next one is written loses something by it.
            self.unsaved += 1
            warn_unsaved(f"step {self.step} of task {self.task.index}", error, self.folder.state())

    def _note(self, faults: tuple[str, ...]) -> None:
        known = self.counts.faults
        known += [fault for fault in faults if fault not in known]
        allowed = self.max_faults * max(1, self.task.size)
        if len(known) > allowed:
            named = "; ".join(known[:5])
            raise ValueError(
                f"{len(known)} samples of task '{self.task.name}' cannot be read, more than "
                f"data.max_faults={self.max_faults:g} of {self.task.size} allows: {named}"
            )

    def _stop_counting(self, rows: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if rows:
                self.counts.flops_a_row = self._counter.get_total_flops() / rows
            self._counter = None

    def _log(self, trainer: pl.Trainer, terms: Any) -> None:
        values = {f"train/{name}": float(term) for name, term in terms.items()}
        values["train/learning_rate"] = float(self._group_rates[0][0]["lr"])
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.state.step_offset(self.step))

    def _tick(self) -> None:
        now = time.monotonic()
        self.counts.seconds += now - self._clock
        self._clock = now

    def _cost(self, trainer: pl.Trainer, module: ContinualModule) -> TaskCost:
        counts, world = self.counts, trainer.world_size
        rows = counts.rows * world
        new = min(rows, self.task.size * int(trainer.max_epochs or 1)) if module.learns else 0
        learning = [p for p in module.parameters() if p.requires_grad] if module.learns else []
        return TaskCost(
            task=self.task.name,
            seconds=round(counts.seconds, 3),
            steps=counts.steps if module.learns else 0,
            samples_new=new,
            samples_recalled=rows - new if module.learns else 0,
            flops=counts.flops_a_row * rows if module.learns else None,
            peak_memory_bytes=peak_memory(module.device),
            trainable_parameters=sum(p.numel() for p in learning),
            parameters_added=sum(p.numel() for p in module.parameters()) - self.parameters_before,
            bytes_remembered=module.strategy.bytes_remembered(),
        )


def _ours(pl_module: pl.LightningModule) -> ContinualModule:
    if not isinstance(pl_module, ContinualModule):
        raise TypeError(
            f"the sequence runs a ContinualModule and got {type(pl_module).__name__}: use "
            "StrategyHooks in a LightningModule of your own"
        )
    return pl_module


def peak_memory(device: torch.device) -> int:
    """Return the bytes that the device, or on a CPU this process, held at most until now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
