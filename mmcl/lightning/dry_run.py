"""Dry run: estimates of time and memory from a few samples of each task and two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmcl.core import Batch, ReplayPlan, Task, TaskStream
from mmcl.core.strategy import tensor_bytes
from mmcl.data.batches.batch_plan import Mixture
from mmcl.evaluation import AccuracyMatrix
from mmcl.lightning.continual_run import SCORES, TRAINER_OVERRIDES
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.evaluate import evaluate_row
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.strategy_callback import StrategyCallback
from mmcl.lightning.task_callback import peak_memory

ROWS, TIMED_ROWS, STEPS, PASS_BATCHES = 8, 64, 2, 4


@dataclass(frozen=True)
class DryRunReport:
    """Report of a dry run.

    Attributes:
        stream: the stream with counted sizes.
        scores: metric of every column on a few samples before training, 0 to 1.
        steps: optimizer steps of every task, all epochs.
        step_seconds: time of one optimizer step.
        train_seconds: estimated time of all steps.
        pass_seconds: estimated time of the strategy's passes at the end of every task.
        test_seconds: estimated time of evaluating the whole accuracy matrix.
        device: device of the dry run.
        world: number of processes.
        parameters: number of parameters of the model.
        learning: number of trainable parameters.
        peak_memory_bytes: peak so far, on the device (or of the process).
        task_bytes: size of the checkpoint after each task.
        last_bytes: size of a mid-task checkpoint, with the optimizer's state.
        remembered_bytes: size of the strategy's state after a part of the first task.
        remembered_rows: samples of that part; 0 = the strategy took no pass.
        errors: one sentence for each sample that could not be read.
        test_bytes: estimated peak memory of generating for a whole test batch on a GPU, 0 if that
            is no larger than what was tried.
        eval_batch_size: samples of such a batch.
    """

    stream: TaskStream
    scores: tuple[float | None, ...]
    steps: tuple[int, ...]
    step_seconds: float
    train_seconds: float
    pass_seconds: float
    test_seconds: float
    device: str
    world: int
    parameters: int
    learning: int
    peak_memory_bytes: int
    task_bytes: int
    last_bytes: int
    remembered_bytes: int
    remembered_rows: int
    errors: tuple[str, ...]
    test_bytes: int = 0
    eval_batch_size: int = 0

    @property
    def seconds(self) -> float:
        """Estimated time of the whole run."""
        return self.train_seconds + self.pass_seconds + self.test_seconds


def dry_run(
    make_module: Callable[[], ContinualModule],
    make_trainer: Callable[..., pl.Trainer],
    make_data: Callable[[], ContinualDataModule],
) -> DryRunReport:
    """Run everything once without writing: a few test samples per task, two steps of the first.

    Args:
        make_module: builds the module, which is discarded.
        make_trainer: builds a new Trainer; its keyword arguments override the configuration.
        make_data: builds the datamodule.

    Raises:
        ValueError: listing all errors of the card and its shards.
        TypeError: if the strategy needs a member that the model does not have.
    """
    data = make_data()
    data.verify_hashes = True
    data.prepare_data()
    stream = data.stream
    module = make_module()
    module.in_continual_run = True
    few = time_evaluation(module, make_trainer, make_data, ROWS)
    more = time_evaluation(module, make_trainer, make_data, TIMED_ROWS, distinct_cost_tasks(stream))
    trainer, epochs, hooks = _train(module, make_trainer, data)
    replay_plan = module.strategy.replay_plan()
    steps = tuple(_steps(module, data, task, replay_plan, epochs) for task in stream)
    passes = sum(task.size for task in stream) / max(1, hooks.samples_passed)
    task_bytes = tensor_bytes(module.trainable_state_dict())
    return DryRunReport(
        stream=stream,
        scores=tuple(few.matrix.values[0]),
        steps=steps,
        step_seconds=hooks.step_seconds,
        train_seconds=hooks.step_seconds * sum(steps),
        pass_seconds=hooks.pass_seconds * passes if hooks.samples_passed else 0.0,
        test_seconds=estimate_eval_seconds(few, more, stream),
        device=hooks.device,
        world=trainer.world_size,
        parameters=sum(p.numel() for p in module.model.parameters()),
        learning=_count_trainable(module),
        peak_memory_bytes=hooks.peak_memory_bytes,
        task_bytes=task_bytes,
        last_bytes=task_bytes + sum(tensor_bytes(o.state) for o in trainer.optimizers),
        remembered_bytes=module.strategy.state_bytes(),
        remembered_rows=hooks.samples_passed,
        errors=tuple(dict.fromkeys([*few.errors, *hooks.errors])),
        test_bytes=estimate_eval_memory(few, more, stream, data.eval_batch_size),
        eval_batch_size=data.eval_batch_size,
    )


def _count_trainable(module: ContinualModule) -> int:
    return (
        sum(p.numel() for p in module.parameters() if p.requires_grad)
        if module.has_trainable
        else 0
    )


class _TimedHooks(StrategyCallback):
    """Strategy callback that times the steps, and cuts the pass at the end of the task short."""

    def __init__(self) -> None:
        super().__init__()
        self.step_times: list[float] = []
        self.errors: list[str] = []
        self.samples_passed, self.pass_seconds = 0, 0.0
        self.peak_memory_bytes, self.device = 0, "cpu"

    @property
    def step_seconds(self) -> float:
        """Time of the faster step; the first one includes the warm-up."""
        pairs = zip(self.step_times, self.step_times[1:], strict=False)
        return min((end - start for start, end in pairs), default=0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = str(pl_module.device)
        self.step_times.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.errors += batch.errors
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.step_times.append(time.monotonic())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        super().on_train_end(trainer, pl_module)
        self.pass_seconds = time.monotonic() - start
        self.peak_memory_bytes = peak_memory(pl_module.device)

    def _pass(self, trainer: pl.Trainer) -> Iterable[Batch]:
        return _FirstBatches(super()._pass(trainer), self)


class _FirstBatches:
    """Iterable over the first batches of a pass, which counts their samples."""

    def __init__(self, batches: Iterable[Batch], hooks: _TimedHooks) -> None:
        self.batches, self.hooks = batches, hooks

    def __iter__(self) -> Any:
        for batch in islice(self.batches, PASS_BATCHES):
            self.hooks.samples_passed += len(batch)
            self.hooks.errors += batch.errors
            yield batch

    def __len__(self) -> int:
        return min(PASS_BATCHES, len(self.batches))  # type: ignore[arg-type]


def _train(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer], data: ContinualDataModule
) -> tuple[pl.Trainer, int, _TimedHooks]:
    """Train for two steps; also return the configured number of epochs per task."""
    hooks = _TimedHooks()
    data.set_task(0)
    trainer = make_trainer(callbacks=[hooks], logger=False, **TRAINER_OVERRIDES)
    epochs = max(1, trainer.max_epochs or 1)
    trainer.fit_loop.max_epochs = 1
    trainer.accumulate_grad_batches = data.accumulate_grad_batches(trainer.world_size)
    trainer.limit_train_batches = STEPS * trainer.accumulate_grad_batches
    module.train()
    trainer.fit(module, datamodule=data, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, epochs, hooks


def _steps(
    module: ContinualModule, data: ContinualDataModule, task: Task,
    replay_plan: ReplayPlan | None, epochs: int
) -> int:  # fmt: skip
    """Estimate the optimizer steps of a task, including the strategy's replay samples."""
    if not module.has_trainable:
        return 1
    buffer_size, ratio = 0, None
    if replay_plan is not None and task.index:
        ratio = replay_plan.replay_ratio
        earlier = sum(old.size for old in data.stream.tasks[: task.index])
        buffer_size = min(earlier, len(replay_plan)) if ratio is not None else earlier
    sources = [(data.stream.sources[i - 1].task.size, fraction) for i, fraction in task.mixture]
    ratio = ratio and (task.replay_ratio or ratio)
    mixture = Mixture(task.size, data.global_batch_size, buffer_size, ratio, tuple(sources))
    return (task.epochs or epochs) * mixture.steps


class _EvalTimer(pl.Callback):
    """Callback that measures time and peak memory of an evaluation, without building the Trainer.

    Attributes:
        seconds: total time.
        seconds_of: time of the batches of each loader.
        peak_bytes: peak memory on a GPU, 0 elsewhere.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, 0
        self.seconds_of: dict[int, float] = {}

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self.seconds = -time.monotonic()

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        seconds = self.seconds_of.setdefault(dataloader_idx, 0.0)
        self.seconds_of[dataloader_idx] = seconds - time.monotonic()

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.seconds_of[dataloader_idx] += time.monotonic()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.monotonic()
        if pl_module.device.type == "cuda":
            self.peak_bytes = int(torch.cuda.max_memory_allocated(pl_module.device))


@dataclass(frozen=True)
class TimedEvaluation:
    """Scores, time and memory of evaluating a few samples of some columns.

    Attributes:
        matrix: matrix with the scores in row 0.
        rows: number of samples of each column.
        seconds: total time.
        seconds_of: time of each column, as its fraction of the total.
        peak_bytes: peak memory on a GPU, 0 elsewhere.
        errors: one sentence for each sample that could not be read.
    """

    matrix: AccuracyMatrix
    rows: dict[int, int]
    seconds: float
    seconds_of: dict[int, float]
    peak_bytes: int
    errors: list[str]


def time_evaluation(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer],
    make_data: Callable[[], ContinualDataModule], rows: int, columns: Sequence[int] | None = None,
) -> TimedEvaluation:  # fmt: skip
    """Evaluate a few samples of some columns before training, without writing anything.

    Args:
        module: is left unchanged.
        make_trainer: builds a new Trainer; its keyword arguments override the configuration.
        make_data: builds the datamodule.
        rows: samples of each column, at most.
        columns: matrix columns, None = all.
    """
    data = make_data()
    data.max_samples = (
        rows
        if data.max_samples is None or data.max_samples < 1
        else min(rows, int(data.max_samples))
    )
    data.max_bad_fraction = 1.0  # one of so few is a large fraction; all are named in the result
    data.setup()
    selected = range(len(data.stream.all_tasks)) if columns is None else columns
    matrix = AccuracyMatrix.for_stream(data.stream, SCORES)
    timer = _EvalTimer()
    trainer = make_trainer(callbacks=[timer], logger=False, **TRAINER_OVERRIDES)
    read_only = RunDirectory(Path(), writes=False)
    errors = evaluate_row(module, data, trainer, matrix, read_only, 0, selected)
    counts = {column: data.stream.evaluated_task(column).test_size for column in selected}
    total = sum(timer.seconds_of.values()) or 1.0
    seconds = {
        column: timer.seconds * timer.seconds_of.get(index, 0.0) / total
        for index, column in enumerate(selected)
    }
    return TimedEvaluation(matrix, counts, timer.seconds, seconds, timer.peak_bytes, errors)


def distinct_cost_tasks(stream: TaskStream) -> list[int]:
    """Return one column for each distinct cost of a test sample."""
    return sorted(set(_first_of_cost(stream).values()))


def _first_of_cost(stream: TaskStream) -> dict[int, int]:
    """Map every column to the first one of equal cost per sample: the answer length decides."""
    first: dict[tuple[object, ...], int] = {}
    first_of = {}
    for index, task in enumerate(stream.all_tasks):
        cost: tuple[object, ...] = (task.task_type,)
        if task.task_type == "instruction":
            is_generated = task.decoding == "generate"
            cost += (task.decoding, task.max_new_tokens if is_generated else len(task.classes))
        first_of[index] = first.setdefault(cost, index)
    return first_of


def estimate_eval_seconds(few: TimedEvaluation, more: TimedEvaluation, stream: TaskStream) -> float:
    """Estimate the wall time of evaluating the whole accuracy matrix.

    Two timings give a linear model: ``more`` yields the seconds per sample, ``few`` the fixed
    overhead per evaluation. Too high for generated answers, which are longest before training.
    """
    first_of = _first_of_cost(stream)
    per_sample = {column: more.seconds_of[column] / more.rows[column] for column in more.rows}
    few_samples = sum(per_sample[first_of[column]] * n for column, n in few.rows.items())
    overhead = max(0.0, (few.seconds - few_samples) / len(few.rows))
    all_samples = sum(
        per_sample[first_of[column]] * task.test_size
        for column, task in enumerate(stream.all_tasks)
    )
    return (len(stream) + 1) * (len(stream.all_tasks) * overhead + all_samples)


def estimate_eval_memory(
    few: TimedEvaluation, more: TimedEvaluation, stream: TaskStream, eval_batch_size: int
) -> int:
    """Estimate the peak GPU memory of generating for ``eval_batch_size`` samples, 0 if unknown."""
    most, least = max(more.rows.values()), max(few.rows.values())
    count = min(eval_batch_size, max(task.test_size for task in stream.all_tasks))
    is_generated = any(task.task_type == "instruction" for task in stream.all_tasks)
    if not is_generated or not more.peak_bytes or count <= most or most <= least:
        return 0
    per_sample = max(0, more.peak_bytes - few.peak_bytes) / (most - least)
    return int(more.peak_bytes + per_sample * (count - most))
