"""The loop over tasks: a fresh Trainer for each, and a folder from which a killed run goes on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from mmcl.core import begin_task
from mmcl.lightning.cells import record_cells
from mmcl.lightning.checkpoint_file import all_or_none
from mmcl.lightning.data import ContinualData
from mmcl.lightning.endings import told_in_a_sentence
from mmcl.lightning.folder import RunFolder, RunState, check_grown, task_mark
from mmcl.lightning.module import ContinualModule, check_state
from mmcl.lightning.running import TaskHooks
from mmcl.lightning.sharing import expect_readable, forget_devices, forget_inside
from mmcl.metrics import AccuracyMatrix
from mmcl.metrics.cost import Ledger

SCORES = {"caption": "recall@1", "retrieve": "recall@1"}
OWN_SETTINGS = {
    "use_distributed_sampler": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}
"""What a sequence asks of every Trainer: loaders, checkpoints and progress are its own."""


class SequenceRun:
    """One run over a stream of tasks.

    Args:
        make_module: builds the module from its configuration, the same every time.
        make_trainer: builds a fresh Trainer from keyword arguments that win over its own.
        data: the stream.
        folder: of the run.
        seed: of the run.
        save_every_steps: optimiser steps between mid-task checkpoints, 0 = none.
        say: is told in sentences what happens; the library itself prints nothing.
    """

    def __init__(
        self,
        make_module: Callable[[], ContinualModule],
        make_trainer: Callable[..., pl.Trainer],
        data: ContinualData,
        folder: Path,
        *,
        seed: int = 0,
        save_every_steps: int = 200,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.make_module, self.make_trainer, self.data = make_module, make_trainer, data
        self.is_first = first_process()
        self.folder = RunFolder(folder, writes=self.is_first)
        self.seed, self.save_every_steps = seed, save_every_steps
        self.say = say if self.is_first else lambda sentence: None

    def run(self) -> AccuracyMatrix:
        """Learn what is not learned yet, score what is not scored yet.

        Returns:
            the matrix; everything else is in the folder.

        Raises:
            OSError: if the folder cannot be written to, or its disk is full.
            RuntimeError: if another process writes into the folder, or one of this run was lost.
            ValueError: if the folder holds another run, the card or a shard is faulty, or too many
                samples are.
        """
        with self.folder.held(), told_in_a_sentence(self._where):
            return self._run()

    def _run(self) -> AccuracyMatrix:
        started = time.monotonic()
        self.data.prepare_data()
        self.data.memory = self.folder.path / "memory"
        stream = self.data.stream
        state = self.folder.state() or RunState(done=0, task=0, tasks=[], seed=self.seed)
        check_grown(state, self.data.on_card)
        self._tell_start(state)
        matrix = self._matrix()
        module = self._module_after(state.done)
        self._score_rows(matrix, module, state)
        earlier = state.seconds
        for task in stream.tasks[state.done :]:
            self._learn(module, state, task.index)
            state.seconds = round(earlier + time.monotonic() - started, 3)
            self.folder.save(state)
            self._score(matrix, module, task.index + 1, state)
        return matrix

    def evaluate(self, rows: Sequence[int], columns: Sequence[int]) -> AccuracyMatrix:
        """Score cells anew from the kept checkpoints, under ``evaluation/``.

        Args:
            rows: 0 = before training, t = after t tasks.
            columns: tasks, then probes.

        Returns:
            a matrix in which only these cells are measured.
        """
        matrix = AccuracyMatrix.for_stream(self.data.stream, SCORES)
        folder = RunFolder(self.folder.path / "evaluation", writes=self.is_first)
        for row in rows:
            module = self._module_after(row)
            record_cells(module, self.data, self._trainer([]), matrix, folder, row, columns)
        return matrix

    def module_after(self, tasks: int | None = None) -> ContinualModule:
        """Build the module as it was after so many tasks, None = all that were learned.

        Raises:
            FileNotFoundError: if the run has not come so far.
        """
        self.data.prepare_data()
        state = self.folder.state()
        done = 0 if state is None else state.done
        return self._module_after(done if tasks is None else tasks)

    def _where(self) -> str:
        """Say from where the same command would go on."""
        state = self.folder.state()
        return "anew" if state is None else state.where()

    def _tell_start(self, state: RunState) -> None:
        total = len(self.data.stream)
        if state.done == total:
            self.say(f"all {total} tasks are learned: {self.folder.path}")
        elif state.last is not None:
            self.say(f"going on {state.where()}, from {self.folder.path / state.last}")
        elif state.done:
            self.say(f"going on {state.where()}, from {self.folder.after(state.done)}")

    def _matrix(self) -> AccuracyMatrix:
        fresh = AccuracyMatrix.for_stream(self.data.stream, SCORES)
        return fresh.with_cells_of(self.folder.path / "matrix.json")

    def _module_after(self, tasks: int) -> ContinualModule:
        """Build the module as it was after so many tasks."""
        module = self.make_module()
        module.in_sequence = True
        module.strategy.keep_in(self.folder.path / "memory")
        for task in self.data.stream.tasks[:tasks]:
            begin_task(module.model, module.strategy, task)
        if tasks:
            load_state(module, self.folder.after(tasks))
        return module

    def _score_rows(self, matrix: AccuracyMatrix, module: ContinualModule, state: RunState) -> None:
        """Score the cells of finished rows that are missing: after a kill, or a grown card."""
        for row in range(state.done + 1):
            if matrix.missing([row]):
                then = module if row == state.done else self._module_after(row)
                self._score(matrix, then, row, state)

    def _score(
        self, matrix: AccuracyMatrix, module: ContinualModule, row: int, state: RunState
    ) -> None:
        columns = [column for _, column in matrix.missing([row])]
        self.data.task = max(0, row - 1)
        trainer = self._trainer([])
        faults = record_cells(module, self.data, trainer, matrix, self.folder, row, columns)
        forget_devices(trainer, module)
        state.faults += [fault for fault in faults if fault not in state.faults]
        if faults and state.tasks:
            self.folder.save(state)
        measured = matrix.values[row][: row or matrix.tasks]
        mean = 100 * sum(value for value in measured if value is not None) / len(measured)
        what = f"after '{matrix.rows[row]}'" if row else "before training"
        self.say(f"{what}: mean of its tasks {mean:.1f} %")

    def _learn(self, module: ContinualModule, state: RunState, index: int) -> None:
        stream = self.data.stream
        task = stream[index]
        if len(state.tasks) == index:
            state.tasks.append(task_mark(self.data.on_card, self.data.on_card[index]))
        state.task = index
        self.folder.save(state)
        hooks = TaskHooks(
            task,
            self.folder,
            state,
            seed=self.seed,
            save_every_steps=self.save_every_steps,
            max_faults=self.data.max_faults,
        )
        self.data.select(index)
        epochs = {} if task.epochs is None else {"max_epochs": task.epochs}
        trainer = self._trainer([hooks], **epochs)
        trainer.accumulate_grad_batches = self.data.accumulation(trainer.world_size)
        last = None if state.last is None else self.folder.path / state.last
        expect_readable(trainer, last)
        with warnings.catch_warnings():
            # Our loader goes on by itself; Lightning cannot know that.
            warnings.filterwarnings("ignore", ".*dataloader is not resumable.*")
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            module.train()
            trainer.fit(module, datamodule=self.data, ckpt_path=last, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        self._end(state, hooks, trainer)
        forget_devices(trainer, module)

    def _end(self, state: RunState, hooks: TaskHooks, trainer: pl.Trainer) -> None:
        state.done, state.last, state.step = hooks.task.index + 1, None, 0
        state.steps += hooks.counts.steps
        state.warnings += hooks.warnings
        state.faults += [fault for fault in hooks.counts.faults if fault not in state.faults]
        for sentence in hooks.warnings:
            warnings.warn(sentence, stacklevel=2)
        with all_or_none(trainer):
            if self.is_first:
                ledger_file = self.folder.path / "ledger.json"
                ledger = Ledger.read(ledger_file) if ledger_file.is_file() else Ledger()
                ledger.put(hooks.cost)
                ledger.write(ledger_file)
                self.folder.save(state)
                forget_inside(self.folder.last.parent)

    def _trainer(self, callbacks: Sequence[pl.Callback], **settings: Any) -> pl.Trainer:
        return self.make_trainer(
            callbacks=list(callbacks),
            default_root_dir=str(self.folder.path),
            **OWN_SETTINGS,
            **settings,
        )


def first_process() -> bool:
    """Tell whether this is rank 0; Lightning knows it before any process group exists."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


def load_state(module: ContinualModule, file: Path) -> None:
    """Load a task's checkpoint into a module that has begun as many tasks.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if it is broken, or belongs to another model or strategy.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}: the run needs it to go on")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in as many ways as it can be broken
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}): it is broken or holds pickled "
            "objects, which are never run; restore the file, or remove the run's folder"
        ) from error
    check_state(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
