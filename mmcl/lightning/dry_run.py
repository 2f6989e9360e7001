"""Dry run: counts of samples, estimates of time and memory from a few of them and two steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmcl.core import Batch, ReplayPlan, Task, TaskStream, Transform
from mmcl.core.strategy import tensor_bytes
from mmcl.data.batches.batch_plan import Mixture, expect_samples_for_all
from mmcl.data.batches.collate import collate
from mmcl.data.validate.sample_counts import COUNTED, SplitCount, count_samples, longest_examples
from mmcl.evaluation import AccuracyMatrix
from mmcl.lightning.continual_run import SCORES
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.evaluate import evaluate_row
from mmcl.lightning.model_support import make_supported_module
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.stages.task_cost import peak_memory
from mmcl.lightning.strategy_callback import StrategyCallback

ROWS, STEPS, PASS_BATCHES = 32, 2, 4
"""Test samples of every task, optimizer steps, and batches of the pass at the end of a task."""


@dataclass(frozen=True)
class DryRunReport:
    """Report of a dry run.

    Attributes:
        stream: the stream with counted sizes.
        scores: metric of every column on a few samples before training, 0 to 1.
        steps: optimizer steps of every task, all epochs.
        step_seconds: time of one optimizer step.
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
        test_bytes: estimated peak memory of generating for a test batch on a GPU, 0 = as tried.
        eval_batch_size: samples of such a batch.
        counts: tokens and bad samples of every split.
        parts: part of the model, and the strategy -> its parameters and the trainable ones of them.
        module: the module after the dry run.
        micro_batch_size: samples of a forward pass in training.
    """

    stream: TaskStream
    scores: tuple[float | None, ...]
    steps: tuple[int, ...]
    step_seconds: float
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
    counts: tuple[SplitCount, ...] = ()
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    module: Any = None
    micro_batch_size: int = 0

    @property
    def train_seconds(self) -> float:
        """Estimated time of all steps."""
        return self.step_seconds * sum(self.steps)

    @property
    def seconds(self) -> float:
        """Estimated time of the whole run."""
        return self.train_seconds + self.pass_seconds + self.test_seconds


def dry_run(
    make_module: Callable[[], ContinualModule],
    make_trainer: Callable[..., pl.Trainer],
    make_data: Callable[[], ContinualDataModule],
    counted: int | None = COUNTED,
) -> DryRunReport:
    """Run everything once without writing: a few test samples per task, two steps of the first.

    The first step is that of the longest samples that were counted, of all tasks.

    Args:
        make_module: builds the module, which is discarded.
        make_trainer: builds a new Trainer; its keyword arguments override the configuration.
        make_data: builds the datamodule.
        counted: samples of every split that are counted at most, None = all.

    Raises:
        ValueError: listing all errors of the card and its shards, or the reasons for which the run
            would end: too many samples that it cannot use or answer, too few for all devices, or
            a learning-rate schedule without an end.
        TypeError: if the strategy needs a member that the model does not have.
    """
    data = make_data()
    data.verify_hashes = True
    data.prepare_data()
    stream = data.stream
    module: ContinualModule = make_supported_module(make_module, stream)
    module.in_continual_run = True
    counts = count_samples(data.prepared, module.model.transform, counted)
    few, batch_size = make_data(), data.eval_batch_size
    scores, errors, timer = _evaluate(module, make_trainer, few)
    refused = _unanswered(module, stream, data.max_bad_fraction)
    trainer, length, hooks = _train(module, make_trainer, data, counts)
    replay_plan = module.strategy.replay_plan()
    steps = tuple(_steps(module, data, task, replay_plan, length, trainer) for task in stream)
    refused += _refusals(counts, data, steps)
    if refused:
        raise ValueError("the run would end early: " + "; ".join(refused))
    seen = hooks.samples_passed
    passes = sum(task.size for task in stream) / seen if seen else 0
    return DryRunReport(
        stream=stream, scores=scores, steps=steps, step_seconds=hooks.step_seconds,
        pass_seconds=hooks.pass_seconds * passes,
        test_seconds=estimate_eval_seconds(timer.seconds, few.stream, stream),
        device=hooks.device, world=trainer.world_size, peak_memory_bytes=hooks.peak_memory_bytes,
        remembered_rows=seen, errors=tuple(dict.fromkeys([*errors, *hooks.errors])),
        test_bytes=estimate_eval_memory(timer.start_bytes, timer.peak_bytes, stream, batch_size),
        eval_batch_size=batch_size, counts=tuple(counts), micro_batch_size=hooks.micro_batch_size,
        **_sizes(module, trainer),
    )  # fmt: skip


def _sizes(module: ContinualModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Return the fields of a report that count parameters and bytes of the module."""
    task_bytes = tensor_bytes(module.trainable_state_dict())
    trainable = [p for p in module.parameters() if p.requires_grad and module.has_trainable]
    return {
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "learning": sum(p.numel() for p in trainable),
        "task_bytes": task_bytes,
        "last_bytes": task_bytes + sum(tensor_bytes(o.state) for o in trainer.optimizers),
        "remembered_bytes": module.strategy.state_bytes(),
        "parts": _parts(module),
        "module": module,
    }


def _parts(module: ContinualModule) -> dict[str, tuple[int, int]]:
    """Return the parameters of the model's parts and of the strategy, and the trainable of them."""
    parts: dict[str, list[Any]] = getattr(module.model, "parts", dict)()
    inside = {id(parameter) for parameter in module.model.parameters()}
    parts["strategy"] = [p for p in module.strategy.parameters() if id(p) not in inside]
    return {
        name: (sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad))
        for name, own in parts.items()
    }


def _refusals(
    counts: Sequence[SplitCount], data: ContinualDataModule, steps: Sequence[int]
) -> list[str]:
    """Return why a run would end because of its samples."""
    reasons = []
    for count in counts:
        if count.task not in data.stream.all_tasks:
            continue  # bad samples of a source are not counted against a task
        is_trained = count.split == "train"
        seen = steps[count.task.index] * data.global_batch_size if is_trained else count.size
        reasons.append(count.refusal(data.max_bad_fraction, seen))
    return [reason for reason in reasons if reason]


def _unanswered(module: ContinualModule, stream: TaskStream, max_bad_fraction: float) -> list[str]:
    """Return why a run would end because of test samples that the model did not answer."""
    reasons = []
    for scorer in module.scorers:
        task = stream.evaluated_task(scorer.column.task.index)
        errors = [error for error in scorer.errors if ": no answer (" in error]
        tried = min(ROWS, task.test_size)
        if len(errors) > 1 and len(errors) > max_bad_fraction * tried:
            reasons.append(
                f"{len(errors)} of {tried} test samples of '{task.name}' get no answer, and "
                f"data.max_bad_fraction={max_bad_fraction:g}: {'; '.join(errors[:2])}"
            )
    return reasons


class _LongestFirst:
    """Training loader whose first batch is made of the longest samples."""

    def __init__(self, loader: Any, counts: Sequence[SplitCount], transform: Transform) -> None:
        self.loader, self.counts, self.transform = loader, counts, transform

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.loader):
            yield batch if number else self._longest(batch)

    def _longest(self, batch: Batch) -> Batch:
        examples = longest_examples(self.counts, self.transform, len(batch))
        if not examples:
            return batch
        longest = collate(examples, batch.errors, batch.loss_weight)
        return replace(longest, global_batch=batch.global_batch)


class _TimedHooks(StrategyCallback):
    """Strategy callback that times the steps, and cuts the pass at the end of the task short."""

    def __init__(self) -> None:
        super().__init__()
        self.step_times: list[float] = []
        self.errors: list[str] = []
        self.samples_passed, self.pass_seconds = 0, 0.0
        self.peak_memory_bytes, self.device, self.micro_batch_size = 0, "cpu", 0

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
        self.micro_batch_size = max(self.micro_batch_size, len(batch))
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.step_times.append(time.monotonic())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        self.run_end_task(trainer, pl_module)
        self.pass_seconds = time.monotonic() - start
        self.peak_memory_bytes = peak_memory(pl_module.device)

    def _pass(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterable[Batch]:
        return _FirstBatches(super()._pass(trainer, pl_module), self)


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


@dataclass(frozen=True)
class _TaskLength:
    """Length of a task: epochs (-1 = any), limit of an epoch's global batches, most steps."""

    epochs: int
    limit: int | float
    max_steps: int | None

    def steps(self, epoch_steps: int, epochs: int | None) -> int:
        """Return the steps of a task, given those of an epoch and the epochs on its card."""
        is_count = isinstance(self.limit, int)
        limited = min(epoch_steps, self.limit) if is_count else epoch_steps * self.limit
        lengths = ((epochs or self.epochs) * int(limited), self.max_steps)
        return min((n for n in lengths if n is not None and n > 0), default=int(limited))


def _train(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer], data: ContinualDataModule,
    counts: Sequence[SplitCount],
) -> tuple[pl.Trainer, _TaskLength, _TimedHooks]:  # fmt: skip
    """Train for two steps; also return the configured length of a task."""
    hooks = _TimedHooks()
    data.set_task(0)
    transform = module.model.transform(True)
    data.wrap_train_loader = lambda loader: _LongestFirst(loader, counts, transform)
    settings = {"logger": False, "limit_val_batches": 0, "fast_dev_run": False}
    trainer = make_trainer(callbacks=[hooks], **settings)
    epochs, limit = trainer.max_epochs or 1, trainer.limit_train_batches
    length = _TaskLength(epochs, limit, None if trainer.max_steps == -1 else trainer.max_steps)
    is_endless = epochs == -1 and length.max_steps is None
    schedules = [module.settings_of(task.stage).schedule for task in data.stream]
    endless = next((each for each in schedules if each.needs_steps), None) if is_endless else None
    if endless is not None:
        raise ValueError(
            f"lr_schedule is '{endless.kind}' and trainer.max_epochs -1, so the steps of a task "
            f"are not known (warmup_steps is {endless.warmup_steps}): set max_epochs or max_steps"
        )
    trainer.fit_loop.max_epochs, trainer.limit_train_batches = 1, STEPS
    data.count_global_batches(trainer)
    module.train()
    trainer.fit(module, datamodule=data, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, length, hooks


def _steps(
    module: ContinualModule, data: ContinualDataModule, task: Task,
    replay_plan: ReplayPlan | None, length: _TaskLength, trainer: pl.Trainer
) -> int:  # fmt: skip
    """Estimate the optimizer steps of a task, including the strategy's replay samples.

    Raises:
        ValueError: if a batch has too few samples for all devices.
    """
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
    expect_samples_for_all(task, mixture, trainer.accumulate_grad_batches, trainer.world_size)
    return length.steps(mixture.steps, task.epochs)


class _EvalTimer(pl.Callback):
    """Callback that measures the time of an evaluation, and its memory on a GPU."""

    seconds, start_bytes, peak_bytes = 0.0, 0, 0

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
            self.start_bytes = int(torch.cuda.memory_allocated(pl_module.device))
        self.seconds = -time.monotonic()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds += time.monotonic()
        if pl_module.device.type == "cuda":
            self.peak_bytes = int(torch.cuda.max_memory_allocated(pl_module.device))


def _evaluate(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer], data: ContinualDataModule
) -> tuple[tuple[float | None, ...], list[str], _EvalTimer]:
    """Evaluate a few samples of every column before training; return scores, errors and timer."""
    limit = data.max_samples
    data.max_samples = min(ROWS, limit) if isinstance(limit, int) else ROWS
    data.max_bad_fraction = 1.0  # one of so few is a large fraction; all are named in the result
    data.setup()
    matrix = AccuracyMatrix.for_stream(data.stream, SCORES)
    timer = _EvalTimer()
    trainer = make_trainer(callbacks=[timer], logger=False)
    columns = range(len(data.stream.all_tasks))
    read_only = RunDirectory(Path(), writes=False)
    errors = evaluate_row(module, data, trainer, matrix, read_only, 0, columns)
    return tuple(matrix.values[0]), errors, timer


def estimate_eval_seconds(seconds: float, few: TaskStream, stream: TaskStream) -> float:
    """Estimate the wall time of the whole accuracy matrix from the ``seconds`` of a few samples.

    Too high rather than too low: the measured pass includes the start of every loader, and
    generated answers are longest before training.
    """
    timed, whole = (sum(task.test_size for task in each.all_tasks) for each in (few, stream))
    return (len(stream) + 1) * seconds * whole / max(1, timed)


def estimate_eval_memory(
    start_bytes: int, peak_bytes: int, stream: TaskStream, eval_batch_size: int
) -> int:
    """Estimate the peak GPU memory of generating for ``eval_batch_size`` samples, 0 if unknown.

    Memory grew from ``start_bytes`` to ``peak_bytes`` while ``ROWS`` samples were generated at
    once; on a CPU both are 0.
    """
    count = min(eval_batch_size, max(task.test_size for task in stream.all_tasks))
    is_generated = any(task.task_type == "instruction" for task in stream.all_tasks)
    if not is_generated or not peak_bytes or count <= ROWS:
        return 0
    return start_bytes + (peak_bytes - start_bytes) * count // ROWS
