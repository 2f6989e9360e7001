"""Lightning callback of one task: seeds, checkpoints, learning rate, progress and costs."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from mmcl.core import Task, begin_task
from mmcl.core.atomic_write import WriteError
from mmcl.core.distributed import all_gather_strings
from mmcl.core.seeding import hash_seed
from mmcl.lightning.checkpoints.checkpoint_io import (
    BestWeights,
    KeepBest,
    raise_on_all_ranks,
    remove_mid_task_checkpoints,
    save_mid_task_checkpoint,
    save_task_checkpoint,
)
from mmcl.lightning.config.trainer_settings import (
    early_end,
    expect_no_early_end,
    planned_steps,
)
from mmcl.lightning.datamodule import check_bad_fraction
from mmcl.lightning.loop_progress import rescale_loop_progress, set_loop_progress
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.optimization.lr_schedules import SchedulePosition
from mmcl.lightning.run_dir import RunDirectory, RunState
from mmcl.lightning.run_loggers import ProgressLine, RunLoggers
from mmcl.lightning.stages.budget import RunBudget, TaskLimit
from mmcl.lightning.stages.task_cost import TaskCounters, task_cost
from mmcl.lightning.strategy_callback import StrategyCallback

TaskPart = Literal["whole", "constant", "branch"]


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
        loggers: of the run, which are also the Trainer's.
        keep_best: end the task with the weights of its lowest validation "loss", or of its highest
            "score"; None = with those of its last step.
        part: of the task: "whole", or with an infinite schedule the "constant" part, or the
            annealed "branch" after it.
        position: of the task in the tasks that share its schedule.
        budget: of the run.
        limit: limits of this task's steps by the budget, None = there are none.
        show_progress: draw a progress line on a terminal.
    """

    task: Task
    ends_without_steps = False  # a run never saves the last step of a task

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
        loggers: RunLoggers,
        keep_best: KeepBest | None = None,
        part: TaskPart = "whole",
        position: SchedulePosition | None = None,
        budget: RunBudget | None = None,
        limit: TaskLimit | None = None,
        show_progress: bool = True,
    ) -> None:
        super().__init__(task)
        self.part, self.position = part, position or SchedulePosition()
        self.budget, self.limit = budget or RunBudget(), limit
        self.best = None if keep_best is None else BestWeights(keep_best)
        self.validated = ""  # a sentence on the last validation
        self.show_progress, self._is_save_due = show_progress, False
        self.folder, self.state, self.seed = folder, state, seed
        self.checkpoint_every_n_steps = checkpoint_every_n_steps
        self.max_bad_fraction, self.loggers = max_bad_fraction, loggers
        self.counts = TaskCounters()
        self.warnings: list[str] = []
        self.unsaved = 0
        self.parameters_before = 0
        self._counter: FlopCounterMode | None = None
        self._line: ProgressLine | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin the task, before the optimizer is built."""
        if stage != "fit":
            return
        if not isinstance(pl_module, ContinualModule):
            raise TypeError(
                f"a run needs a ContinualModule and got {type(pl_module).__name__}: use "
                "StrategyCallback with your own LightningModule"
            )
        module = self.module = pl_module
        self.parameters_before = sum(p.numel() for p in module.parameters())
        module.begin_stage(self.task.stage)
        begin_task(module.model, module.strategy, self.task)
        module.update_trainable()
        if not module.has_trainable:
            # Closed form: end_task does it all, but Lightning needs one step for a fit.
            trainer.fit_loop.max_epochs, trainer.limit_train_batches = 1, 1
            self.part = "whole"  # nothing to anneal
        elif self.part == "branch":
            steps = self.state.branch_step
            branch = module.settings.schedule.branch_steps(steps)
            trainer.fit_loop.max_epochs = -1
            trainer.fit_loop.epoch_loop.max_steps = steps + branch
        trainer.datamodule.set_model_classes(module.model)  # type: ignore[attr-defined]
        hooks = ("project_gradients", "after_step")
        self._overrides = {hook: module.strategy.overrides(hook) for hook in hooks}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and the progress line."""
        module = self.module
        self._schedule = schedule = module.settings.schedule
        self._parts = trainer.accumulate_grad_batches
        self.full_steps, self.steps = planned_steps(trainer)
        if not self.steps and schedule.needs_steps:
            raise ValueError(
                f"lr_schedule is '{schedule.kind}' and trainer.max_epochs -1, so the steps of a "
                f"task are not known (warmup_steps is {schedule.warmup_steps}): set max_epochs or "
                "max_steps, or lr_schedule constant and warmup_steps a whole number"
            )
        if self.limit is not None and module.has_trainable:
            self._limit_steps(trainer, self.limit)
        self._task_steps = self.state.branch_step if self.part == "branch" else self.steps
        if self.part != "whole":
            expect_no_early_end(trainer, self.best is not None)
            if self.position.is_first:
                schedule.expect_room(self._task_steps, self.task.name)
        self.step = self.counts.steps
        self._base_rates = [
            (group, group.get("initial_lr", group["lr"]))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        for group, rate in self._base_rates:
            group["initial_lr"] = rate
        self._rank, self._is_on_gpu = trainer.global_rank, module.device.type == "cuda"
        self._log_every = vars(trainer).get("log_every_n_steps", 50) if trainer.loggers else 0
        self._rates: dict[str, float] = {}
        if self._log_every:
            # Lightning's own logs get this as their step: it counts from 0 in every fit.
            trainer.fit_loop.epoch_loop._batches_that_stepped = self.state.steps + self.step + 1
        others: Any = trainer.callbacks  # type: ignore[attr-defined]
        self._is_not_alone = trainer.enable_validation or len(others) > 1
        title = f"task {self.task.index}: {self.task.name}"
        is_shown = self.show_progress and trainer.progress_bar_callback is None
        self._line = ProgressLine(
            title, self.steps or None, is_shown=is_shown and trainer.is_global_zero
        )
        self._clock = time.monotonic()

    def _limit_steps(self, trainer: pl.Trainer, limit: TaskLimit) -> None:
        """Let the task end with the last step within its limits."""
        if not self.steps and limit.limits_steps:
            raise ValueError(
                "budget limits the samples or operations of a task, and trainer.max_epochs is -1: "
                "set max_epochs or max_steps"
            )
        loader: Any = trainer.train_dataloader
        epoch_steps = int(trainer.num_training_batches) // self._parts
        counted = partial(loader.mixture.samples_after, epoch_steps=epoch_steps)
        steps = limit.limit_steps(self.steps, counted, self.counts.flops_per_sample)
        if steps < self.steps:
            trainer.fit_loop.epoch_loop.max_steps = self.steps = steps

    def _is_over_budget(self, trainer: pl.Trainer) -> bool:
        """Return whether the budget ends the task with the step that was just counted."""
        limit = self.limit
        if limit is None:
            return False
        if limit.needs_flops and self.step == 1:
            # Only the first process counts them.
            flops = trainer.strategy.broadcast(self.counts.flops_per_sample)
            self.counts.flops_per_sample = float(flops)
            self._limit_steps(trainer, limit)
            self._task_steps = self.steps
        self._update_seconds()
        return limit.is_over(trainer, self.counts.seconds)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch, so that a step's dropout is a function of seed, task, step and rank.

        A checkpoint that waited for validation and other callbacks is saved first.
        """
        if self._is_save_due:
            self._is_save_due = False
            self._save(trainer)
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
        module = self.module
        if self._overrides["project_gradients"]:
            module.strategy.project_gradients(module.model)
        if self._schedule.is_active:
            factor = self._schedule.factor(self.step, self._task_steps, self.position)
            for group, rate in self._base_rates:
                group["lr"] = rate * factor
        self.step += 1
        if self._is_logged():
            # A scheduler sets the rates of the next step before this one is logged.
            self._rates = {
                f"learning_rate/{group.get('name', number)}": float(group["lr"])
                for number, (group, _) in enumerate(self._base_rates)
            }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Pass the step to the strategy, count it, and save a checkpoint if one is due."""
        module, counts, samples = self.module, self.counts, len(batch)
        self._stop_flop_counter(samples)
        done = module.last_step
        if done is not None:
            self.alarm.update(done.terms)
            if self._overrides["after_step"]:
                module.strategy.after_step(module.model, done.batch, done.output)
        self._add_errors(batch.errors)
        counts.notes.update(dict.fromkeys(batch.notes, True))
        if self._line is not None and self._line.wants() and outputs is not None:
            self._line.show(self.step, float(outputs["loss"]))
        if self.step == counts.steps:
            return
        counts.steps = self.step
        sizes = batch.global_batch
        counts.rows += samples if sizes is None else sizes.samples
        counts.new += samples if sizes is None else sizes.new
        if done is not None and self._is_logged():
            terms = {"loss": done.loss, **done.terms}
            values = {f"train/{name}": float(term.detach()) for name, term in terms.items()}
            self.loggers.log({**values, **self._rates}, self.state.steps + self.step)
        if self._is_over_budget(trainer):
            return
        every = self.checkpoint_every_n_steps
        # The last step is never saved: a resumed task must have a step left, because Lightning
        # calls on_train_end, where the strategy ends the task, only after one.
        if every and self.step % every == 0 and (self.step < self.steps or not self.steps):
            # Validation and other callbacks come after this one and may change their state, or end
            # the task: then the checkpoint is saved when the next batch begins.
            self._is_save_due = self._is_not_alone
            if not self._is_save_due:
                self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the metrics of the validation part, and copy the weights if they are the best."""
        module, metrics = self.module, self.module.validation
        if trainer.sanity_checking or not metrics:
            return
        self._add_errors(tuple(module.scorers[0].errors))
        if self.best is not None:
            self.best.update(metrics, module, self.step)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self.state.steps + self.step)
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.validated = f"task '{self.task.name}' ends with {values}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End the task and write its checkpoint."""
        module = self.module
        if self._line is not None:
            self._line.close()
        if self.part == "constant":
            self._end_constant_part(trainer)
            return
        limit = None if self.limit is None else self.limit.ended_by
        reasons = [early_end(trainer, self.step, self.full_steps, limit)]
        reasons = reasons if module.has_trainable else []
        self.warnings = [f"task '{self.task.name}' {reason}" for reason in reasons if reason]
        if self.best is not None and self.best.state["value"] is None:
            self.warnings.append(
                f"task '{self.task.name}' ended before a validation: no best weights"
            )
        elif self.best is not None:
            self.best.restore(module)
            kept = f"step {self.best.state['step']}, of the best {self.best.measure}"
            self.validated = f"task '{self.task.name}' ends with the weights of {kept}"
        self.run_end_task(trainer, pl_module)
        self.budget.expect_bytes(self.task.name, module.strategy.state_bytes())
        if self.part == "whole":  # after a branch the next task replays what came before it
            self._save_replay_copies(trainer)
        self._update_seconds()
        # Each rank has its own bad samples; all of them are counted and named.
        self._add_errors(tuple(all_gather_strings(self.counts.errors, module.device)))
        notes = sorted({*all_gather_strings(list(self.counts.notes), module.device)})
        if notes:
            self.warnings.append(
                f"task '{self.task.name}': {len(notes)} samples were learned in part, without the "
                f"end of the answer: {'; '.join(notes[:3])}"
            )
        self.warnings += self.alarm.messages(module.strategy, self.task.name)
        if self.unsaved:
            problem = f"{self.unsaved} of its mid-task checkpoints could not be written"
            self.warnings.append(f"task '{self.task.name}': {problem}")
        self.cost = task_cost(self.task, module, self.counts, self.parameters_before)
        self._flush_loggers(trainer)
        save_task_checkpoint(trainer, module, self.folder.task_checkpoint(self.task.index + 1))

    def _end_constant_part(self, trainer: pl.Trainer) -> None:
        """Save the state in which the annealed branch begins, and end the task without it.

        The run state names the first file only when the second is written, so a kill between the
        two repeats steps and skips nothing.
        """
        module, folder, state = self.module, self.folder, self.state
        self._flush_loggers(trainer)
        point = save_mid_task_checkpoint(trainer, folder.checkpoints, self.step, "last_branch.ckpt")
        self.run_end_task(trainer, module)
        self._save_replay_copies(trainer)
        save_task_checkpoint(trainer, module, folder.constant_checkpoint(self.task.index + 1))
        state.last_checkpoint, state.step = f"checkpoints/{point.name}", self.step
        state.branch_step = self.step
        with raise_on_all_ranks(trainer):
            folder.save(state)
            if folder.writes:
                remove_mid_task_checkpoints(folder.checkpoints, but=point)

    def _save_replay_copies(self, trainer: pl.Trainer) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with raise_on_all_ranks(trainer):
            if self.folder.writes:
                plan = self.module.strategy.replay_plan()
                data.save_replay_copies(plan, self.task.index)

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
        """Set Lightning's loop progress to that of an uninterrupted run."""
        set_loop_progress(trainer, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count finished steps in the micro-batches of this start, which may have other devices."""
        now = trainer.accumulate_grad_batches
        then = checkpoint["callbacks"][self.state_key].get("parts", now)
        rescale_loop_progress(checkpoint, then, now)

    def state_dict(self) -> dict[str, Any]:
        """Return the task's counters and the state of its penalty monitor."""
        self._update_seconds()
        counts = {
            **vars(self.counts), "errors": list(self.counts.errors),
            "notes": dict(self.counts.notes),
        }  # fmt: skip
        best = {} if self.best is None else {"best": self.best.state}
        return {"counts": counts, "alarm": self.alarm.state(), "parts": self._parts, **best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the counters and the penalty monitor."""
        self.counts = TaskCounters(**state_dict["counts"])
        self.alarm.load(state_dict["alarm"])
        if self.best is not None and "best" in state_dict:
            self.best.state = dict(state_dict["best"])

    def _save(self, trainer: pl.Trainer) -> None:
        try:
            self._flush_loggers(trainer)
            last = save_mid_task_checkpoint(trainer, self.folder.checkpoints, self.step)
            self.state.last_checkpoint, self.state.step = f"checkpoints/{last.name}", self.step
            self.folder.save(self.state)
            if self.folder.writes:
                remove_mid_task_checkpoints(last.parent, but=last)
        except WriteError as error:
            # Steps are lost only if the run ends before the next checkpoint.
            self.unsaved += 1
            warnings.warn(
                f"step {self.step} of task {self.task.index} is not saved: {error}. The run "
                f"continues; if it stopped now, it would resume {self.folder.resume_point()}",
                stacklevel=2,
            )

    def _flush_loggers(self, trainer: pl.Trainer) -> None:
        if self._log_every:
            with raise_on_all_ranks(trainer):
                self.loggers.flush()

    def _add_errors(self, errors: tuple[str, ...]) -> None:
        if not errors:
            return
        known = self.counts.errors
        known += [error for error in errors if error not in known]
        samples = f"samples of task '{self.task.name}'"
        check_bad_fraction(known, samples, self.task.size, self.max_bad_fraction)

    def _stop_flop_counter(self, samples: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            if samples:
                self.counts.flops_per_sample = self._counter.get_total_flops() / samples
            self._counter = None

    def _is_logged(self) -> bool:
        return self._log_every > 0 and (self.state.steps + self.step) % self._log_every == 0

    def _update_seconds(self) -> None:
        now = time.monotonic()
        self.counts.seconds += now - self._clock
        self._clock = now
