"""Training loop over the tasks of a stream: a new Trainer per task, resumable after a kill."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from mmcl.core import begin_task
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.cost import Ledger
from mmcl.evaluation.gates import Gate, expect_known
from mmcl.lightning.checkpoints.checkpoint_checks import LostCheckpoint, check_whole
from mmcl.lightning.checkpoints.checkpoint_io import (
    KeepBest,
    check_resumable,
    destroy_process_groups,
    raise_on_all_ranks,
    remove_mid_task_checkpoints,
)
from mmcl.lightning.config.stream_settings import unused_stages
from mmcl.lightning.config.trainer_settings import check_monitors, direct_checkpoints
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.evaluate import evaluate_row
from mmcl.lightning.model_support import make_supported_module, pin_template_date
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.optimization.lr_schedules import SchedulePosition, schedule_position
from mmcl.lightning.optimization.stage_settings import task_span
from mmcl.lightning.resume import (
    check_data,
    check_memory_files,
    load_state,
    note_changes,
    set_back,
    task_fingerprint,
)
from mmcl.lightning.run_dir import RunDirectory, RunState
from mmcl.lightning.run_errors import memory_advice, translate_errors
from mmcl.lightning.run_loggers import RunLoggers
from mmcl.lightning.stages.acceptance import expect_gates_kept
from mmcl.lightning.stages.budget import RunBudget, TaskLimit, budget_line
from mmcl.lightning.stages.lineage import note_lineage
from mmcl.lightning.strategy_callback import EVAL_MODE_WARNING
from mmcl.lightning.task_callback import TaskCallback, TaskPart

SCORES = {"captioning": "recall@1", "retrieval": "recall@1"}


class ContinualRun:
    """Resumable run over a stream of tasks.

    Args:
        make_module: builds the module from its configuration, the same every time.
        make_trainer: builds a new Trainer, from ``TRAINER_DEFAULTS`` and the configuration; its
            keyword arguments override both.
        data: datamodule of the stream.
        folder: run directory.
        seed: seed of the run.
        checkpoint_every_n_steps: optimizer steps between mid-task checkpoints, 0 = none.
        keep_best: end every task with the weights of its lowest validation "loss", or of its
            highest "score"; None = with those of its last step.
        gates: limits that the model must keep after each task, or the run stops.
        budget: limits of training and of what a strategy keeps, None = there are none.
        show_progress: draw a progress line on a terminal.
        log: receives log messages; the library itself prints nothing.
        loggers: of Lightning, shared by the Trainers of all tasks, see ``RunLoggers``.
    """

    def __init__(
        self,
        make_module: Callable[[], ContinualModule],
        make_trainer: Callable[..., pl.Trainer],
        data: ContinualDataModule,
        folder: Path,
        *,
        seed: int = 0,
        checkpoint_every_n_steps: int = 200,
        keep_best: KeepBest | None = None,
        gates: Sequence[Gate] = (),
        budget: RunBudget | None = None,
        show_progress: bool = True,
        log: Callable[[str], None] = lambda sentence: None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.make_module, self.make_trainer, self.data = make_module, make_trainer, data
        self.is_first = first_process()
        self.folder = RunDirectory(folder, writes=self.is_first)
        self.seed, self.checkpoint_every_n_steps = seed, checkpoint_every_n_steps
        self.keep_best, self.show_progress = keep_best, show_progress
        self.gates, self.budget = tuple(gates), budget or RunBudget()
        self._has_explained = False
        if keep_best is not None and not data.validation_share:
            raise ValueError(
                f"keep_best is '{keep_best}' and there is no validation part to measure it on: set "
                "data.validation_share, such as 0.1"
            )
        self.log = log if self.is_first else lambda sentence: None
        self.unmeasured: list[str] = []
        self.loggers = RunLoggers(loggers, self.folder)

    def run(self) -> AccuracyMatrix:
        """Train on all remaining tasks and evaluate all missing cells of the accuracy matrix.

        Returns:
            the matrix; everything else is in the run directory.

        Raises:
            GateBroken: after a task that breaks a gate and was not accepted by hand.
            OSError: if the run directory cannot be written to, or its disk is full.
            RuntimeError: if another process uses the run directory, one of this run was lost, or
                memory is exhausted, with the settings that need less.
            ValueError: if the directory holds another run, or the card, a shard or too many samples
                are invalid.
        """
        started = time.monotonic()
        advise = partial(memory_advice, self.data)
        with self.folder.lock(), translate_errors(self.folder.resume_point, advise):
            self.data.prepare_data()
            self.data.memory = self.folder.path / "memory"
            stream = self.data.stream
            state = self.folder.state() or RunState(0, 0, [], self.seed)
            fresh = AccuracyMatrix.for_stream(stream, SCORES)
            matrix = fresh.with_cells_of(self.folder.path / "matrix.json")
            expect_known(self.gates, matrix)
            check_data(self.folder, self.data, state, matrix.measured_names())
            module = self._load_to_resume(state, matrix)
            note_lineage(self.folder, self.data, state.finished_tasks, module)
            self._log_notes(module)
            note_changes(self.folder, state, stream)
            self._log_start(state)
            rows = state.finished_tasks + 1
            self.loggers.resume(state.steps + (state.step if state.last_checkpoint else 0), rows)
            for row in range(rows):
                # Cells of finished rows are missing after a kill, or for appended tasks.
                if matrix.missing([row]):
                    is_here = row == state.finished_tasks and not self._is_constant(module, row)
                    row_module = module if is_here else self._load_to_evaluate(row, matrix)
                    if row_module is not None:
                        self._evaluate_row(matrix, row_module, row, state)
                else:
                    self.loggers.log_row(matrix, row, self._steps_after(row, state), ())
            expect_gates_kept(self.gates, matrix, self.folder, state, self.log)
            if module is None:
                self.loggers.close()
                return matrix
            self._train_tasks(module, state, matrix, started)
            self.loggers.close()
            return matrix

    def _train_tasks(
        self, module: ContinualModule, state: RunState, matrix: AccuracyMatrix, started: float
    ) -> None:
        """Train the remaining tasks, and evaluate the row of each."""
        earlier = state.seconds
        for task in self.data.stream.tasks[state.finished_tasks :]:
            module = self._train_task(module, state, task.index)
            state.seconds = round(earlier + time.monotonic() - started, 3)
            self.folder.save(state)
            note_lineage(self.folder, self.data, state.finished_tasks)
            self._evaluate_row(matrix, module, task.index + 1, state)
            if line := budget_line(self.budget, self._ledger()):
                self.log(line)
            expect_gates_kept(self.gates, matrix, self.folder, state, self.log)
            if self._is_constant(module, task.index + 1):
                module = self._reload(module, task.index + 1)

    def evaluate(self, rows: Sequence[int], columns: Sequence[int]) -> AccuracyMatrix:
        """Evaluate cells again from the task checkpoints, with results under ``evaluation/``.

        Args:
            rows: 0 = before training, t = after t tasks.
            columns: tasks, then eval-only tasks.

        Returns:
            a matrix with only these cells.
        """
        matrix = AccuracyMatrix.for_stream(self.data.stream, SCORES)
        folder = RunDirectory(self.folder.path / "evaluation", writes=self.is_first)
        for row in rows:
            module = self.load_after(row)
            evaluate_row(module, self.data, self._trainer([]), matrix, folder, row, columns)
        return matrix

    def load_after(self, tasks: int | None = None, *, to_train: bool = False) -> ContinualModule:
        """Return the module after ``tasks`` tasks, None = all finished ones.

        Args:
            tasks: number of trained tasks.
            to_train: for the next task, which an infinite schedule trains from the weights before
                the last one's annealed branch.

        Raises:
            LostCheckpoint: if the checkpoint is missing or damaged.
        """
        if tasks is None:
            state = self.folder.state()
            tasks = 0 if state is None else state.finished_tasks
        self.data.prepare_data()
        module: ContinualModule = make_supported_module(self.make_module, self.data.stream)
        module.in_continual_run = True
        pin_template_date(self.folder, module.model)
        module.strategy.set_memory_dir(self.folder.path / "memory")
        for task in self.data.stream.tasks[:tasks]:
            begin_task(module.model, module.strategy, task)
        if tasks:
            is_constant = to_train and self._is_constant(module, tasks)
            folder = self.folder
            file = (folder.constant_checkpoint if is_constant else folder.task_checkpoint)(tasks)
            load_state(module, file)
        return module

    def _reload(self, module: ContinualModule, tasks: int) -> ContinualModule:
        """Return a new module, from which the task after ``tasks`` tasks is trained."""
        fresh = self.load_after(tasks, to_train=True)
        fresh.mesh = module.mesh  # torch caches operations on a mesh by its ranks
        return fresh

    def _is_constant(self, module: ContinualModule | None, tasks: int) -> bool:
        """Return whether the task after ``tasks`` tasks is trained from before the last branch."""
        stream = self.data.stream
        if module is None or not 0 < tasks < len(stream):
            return False
        first, _ = task_span(stream.tasks, tasks, module.stages)
        kind = module.settings_of(stream[tasks].stage).schedule.kind
        # What is solved in closed form has no steps to anneal.
        dummy = module.dummy_parameter
        has_steps = any(p.requires_grad for p in module.parameters() if p is not dummy)
        return first < tasks and kind == "infinite" and has_steps

    def _load_to_resume(self, state: RunState, matrix: AccuracyMatrix) -> ContinualModule | None:
        """Return the module after the last whole checkpoint, to which ``state`` is set back.

        None if all tasks are finished and the last one's checkpoint is lost.
        """
        if state.finished_tasks == len(self.data.stream):
            return self._load_to_evaluate(state.finished_tasks, matrix)
        lost: LostCheckpoint | None = None
        if state.last_checkpoint is not None:
            try:
                check_whole(self.folder.path / state.last_checkpoint)
            except LostCheckpoint as error:
                lost = error
        tasks = state.finished_tasks
        while True:
            try:
                module = self.load_after(tasks, to_train=True)
                if tasks:
                    check_memory_files(module, self.folder.task_checkpoint(tasks))
                break
            except LostCheckpoint as error:
                lost, tasks = lost if tasks < state.finished_tasks else error, tasks - 1
        if lost is not None:
            set_back(self.folder, self.data, state, matrix, tasks, lost)
        return module

    def _load_to_evaluate(self, row: int, matrix: AccuracyMatrix) -> ContinualModule | None:
        """Return the module after ``row`` tasks, or None with a warning if that is lost."""
        try:
            return self.load_after(row)
        except LostCheckpoint as lost:
            empty = ", ".join(f"'{matrix.names[column]}'" for _, column in matrix.missing([row]))
            sentence = f"{lost.reason}: restore it to evaluate or export that state"
            if empty:
                sentence = (
                    f"{lost.reason}: after '{matrix.rows[row]}', {empty} cannot be measured; "
                    "restore the file and give the same command"
                )
                self.unmeasured.append(sentence)
            warnings.warn(sentence, stacklevel=2)
            return None

    def _log_notes(self, module: ContinualModule | None) -> None:
        settings: dict[str, Iterable[str]] = {"data.stages": self.data.stages}
        settings |= {} if module is None else {"model.stages": module.stages}
        for note in (*self.data.prepared.notes, *unused_stages(self.data.stream, settings)):
            self.log(note)

    def _log_start(self, state: RunState) -> None:
        total = len(self.data.stream)
        if day := self.folder.inputs().get("template_date"):
            self.log(f"the chat template writes the date {day}, the day of the first start")
        if state.finished_tasks == total:
            self.log(f"all {total} tasks are finished: {self.folder.path}")
        elif state.last_checkpoint is not None or state.finished_tasks:
            last = state.last_checkpoint
            task_file = self.folder.task_checkpoint(state.finished_tasks)
            file = task_file if last is None else self.folder.path / last
            self.log(f"resuming {state.resume_point()}, from {file}")

    def _evaluate_row(
        self, matrix: AccuracyMatrix, module: ContinualModule, row: int, state: RunState
    ) -> None:
        columns = [column for _, column in matrix.missing([row])]
        self.data.task_index = max(0, row - 1)
        trainer = self._trainer([])
        errors = evaluate_row(module, self.data, trainer, matrix, self.folder, row, columns)
        destroy_process_groups(trainer, module)
        self.loggers.log_row(matrix, row, self._steps_after(row, state), columns)
        state.errors += [error for error in errors if error not in state.errors]
        if errors and state.tasks:
            self.folder.save(state)
        values = matrix.values[row][: row or matrix.tasks]
        mean = 100 * sum(value for value in values if value is not None) / len(values)
        when = f"after '{matrix.rows[row]}'" if row else "before training"
        self.log(f"{when}: mean of its tasks {mean:.1f} %")

    def _steps_after(self, row: int, state: RunState) -> int:
        """Return the optimizer steps of the first ``row`` tasks."""
        if row in (0, state.finished_tasks):
            return state.steps if row else 0
        costs = list(Ledger.read(self.folder.path / "ledger.json"))
        # A task in closed form has an idle step that is no cost.
        return sum(max(1, cost.steps) for cost in costs[:row])

    def _train_task(self, module: ContinualModule, state: RunState, index: int) -> ContinualModule:
        """Train a task, with its annealed branch if its schedule has one; return the module."""
        stream = self.data.stream
        schedule = module.settings_of(stream[index].stage).schedule
        first, last = task_span(stream.tasks, index, module.stages)
        if len(state.tasks) == index:
            declared = self.data.declared_stream
            state.tasks.append(task_fingerprint(declared, declared[index]))
            state.span_last = last
        state.task = index
        self.folder.save(state)
        # A task that began before others were appended keeps the schedule that it was planned with.
        span = (first, last if state.span_last < index else state.span_last)
        part: TaskPart = "whole"
        if schedule.kind == "infinite":
            if self.budget.limits_steps:
                raise ValueError(
                    f"lr_schedule is 'infinite' for task '{stream[index].name}', which ends with "
                    "an annealed branch, and a budget may end it before: limit its steps with "
                    "trainer.max_steps, or use lr_schedule rewarm_cosine"
                )
            part = "branch" if state.branch_step else "constant"
        hooks = self._fit(module, state, part, span)
        if hooks.part == "constant":
            module = self._reload(module, index)
            self._fit(module, state, "branch", span)
        return module

    def _fit(
        self, module: ContinualModule, state: RunState, part: TaskPart, span: tuple[int, int]
    ) -> TaskCallback:
        """Train a part of the task of ``state``, from its last checkpoint if it has one."""
        task, stream = self.data.stream[state.task], self.data.stream
        epochs = {} if task.epochs is None else {"max_epochs": task.epochs}
        position = SchedulePosition(is_first=task.index == span[0], last=span[1])
        if module.settings_of(task.stage).schedule.kind == "meta":
            default = self._trainer([]).max_epochs or 1
            position = schedule_position(stream.tasks, *span, task.index, default)
        hooks = TaskCallback(
            task,
            self.folder,
            state,
            seed=self.seed,
            checkpoint_every_n_steps=self.checkpoint_every_n_steps,
            max_bad_fraction=self.data.max_bad_fraction,
            keep_best=self.keep_best,
            part=part,
            position=position,
            budget=self.budget,
            limit=self._task_limit(),
            show_progress=self.show_progress,
            loggers=self.loggers,
        )
        self.data.set_task(task.index)
        trainer = self._trainer([hooks], logger=self.loggers.loggers or False, **epochs)
        self._explain_accumulation(trainer)
        self.data.count_global_batches(trainer)
        check_monitors(trainer, self.data.validation_metrics)
        direct_checkpoints(trainer, self.folder.checkpoints, task.index)
        last = None if state.last_checkpoint is None else self.folder.path / state.last_checkpoint
        check_resumable(trainer, last)
        with warnings.catch_warnings():
            # Our loader resumes by itself; Lightning cannot know that.
            warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", EVAL_MODE_WARNING)
            module.train()
            trainer.fit(module, datamodule=self.data, ckpt_path=last, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        if hooks.part != "constant":
            self._finish_task(state, hooks, trainer)
        destroy_process_groups(trainer, module)
        return hooks

    def _ledger(self) -> Ledger:
        file = self.folder.path / "ledger.json"
        return Ledger.read(file) if file.is_file() else Ledger()

    def _task_limit(self) -> TaskLimit | None:
        """Return the limits of the next task by the budget; BudgetSpent if nothing is left."""
        if not self.budget.limits_steps:
            return None
        return TaskLimit(self.budget, self._ledger())

    def _explain_accumulation(self, trainer: pl.Trainer) -> None:
        parts = trainer.accumulate_grad_batches
        if parts > 1 and self.is_first and not self._has_explained:
            self._has_explained = True
            warnings.warn(
                f"trainer.accumulate_grad_batches is {parts}: every device takes its part of a "
                f"global batch in {parts} micro-batches, and an optimizer step is still over "
                f"data.global_batch_size {self.data.global_batch_size} samples",
                stacklevel=2,
            )

    def _finish_task(self, state: RunState, hooks: TaskCallback, trainer: pl.Trainer) -> None:
        state.finished_tasks, state.last_checkpoint = hooks.task.index + 1, None
        state.step = state.branch_step = 0
        state.steps += hooks.counts.steps
        state.warnings += hooks.warnings
        state.errors += [error for error in hooks.counts.errors if error not in state.errors]
        for sentence in hooks.warnings:
            warnings.warn(sentence, stacklevel=2)
        if hooks.validated:
            self.log(hooks.validated)
        with raise_on_all_ranks(trainer):
            if self.is_first:
                ledger = self._ledger()
                ledger.put(hooks.cost)
                ledger.write(self.folder.path / "ledger.json")
                self.folder.save(state)
                remove_mid_task_checkpoints(self.folder.checkpoints)

    def _trainer(self, callbacks: Sequence[pl.Callback], **settings: Any) -> pl.Trainer:
        return self.make_trainer(
            callbacks=list(callbacks),
            default_root_dir=str(self.folder.path),
            **{"logger": False, **settings},
        )


def first_process() -> bool:
    """Return whether this process is rank 0, which Lightning knows before any process group."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)
