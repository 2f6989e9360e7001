"""What a run will take, from a few rows of every task and two steps of the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from mmcl.core import Batch, Recall, Task, TaskStream
from mmcl.data.order import Mixture
from mmcl.lightning.data import ContinualData
from mmcl.lightning.hooks import StrategyHooks
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.reckoning import score_rows, scoring_bytes, scoring_seconds, unlike_columns
from mmcl.lightning.running import peak_memory
from mmcl.lightning.sequence import OWN_SETTINGS

ROWS, TIMED_ROWS, STEPS, PASS_BATCHES = 8, 64, 2, 4


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        stream: with the sizes that were counted.
        scores: of every column on a few rows before training, 0 to 1.
        steps: optimiser steps of every task, all epochs.
        step_seconds: of one optimiser step.
        train_seconds: of all steps.
        pass_seconds: of the strategy's passes at the end of every task.
        test_seconds: of scoring the whole matrix.
        device: on which it ran.
        world: number of processes.
        parameters: of the model, all.
        learning: parameters that learn.
        peak_memory_bytes: until now, on the device (or in the process).
        task_bytes: of the checkpoint kept after each task.
        last_bytes: of the checkpoint inside a task, with the optimiser's state.
        remembered_bytes: of the strategy after a part of the first task.
        remembered_rows: rows of that part; 0 = the strategy took no pass.
        faults: what could not be read, one sentence each.
        test_bytes: reckoned of generating for a whole test batch on a GPU, 0 where that is no more
            than was tried.
        test_batch: rows of such a batch.
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
    faults: tuple[str, ...]
    test_bytes: int = 0
    test_batch: int = 0

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.train_seconds + self.pass_seconds + self.test_seconds


def check(
    make_module: Callable[[], ContinualModule],
    make_trainer: Callable[..., pl.Trainer],
    make_data: Callable[[], ContinualData],
) -> Check:
    """Load everything, score a few rows of every task, take two steps of the first; keep nothing.

    Args:
        make_module: builds the module, which is thrown away.
        make_trainer: builds a fresh Trainer from keyword arguments that win over its own.
        make_data: builds the datamodule.

    Raises:
        ValueError: listing what is wrong with the card or its shards.
        TypeError: if the strategy asks what the model has not.
    """
    data = make_data()
    data.verify_hashes = True
    data.prepare_data()
    stream = data.stream
    module = make_module()
    module.in_sequence = True
    few = score_rows(module, make_trainer, make_data, ROWS)
    more = score_rows(module, make_trainer, make_data, TIMED_ROWS, unlike_columns(stream))
    trainer, epochs, hooks = _train(module, make_trainer, data)
    recall = module.strategy.recall()
    steps = tuple(_steps(module, data, task, recall, epochs) for task in stream)
    passed = sum(task.size for task in stream) / max(1, hooks.rows_passed)
    kept = size_of(module.kept_state())
    return Check(
        stream=stream,
        scores=tuple(few.matrix.values[0]),
        steps=steps,
        step_seconds=hooks.step_seconds,
        train_seconds=hooks.step_seconds * sum(steps),
        pass_seconds=hooks.pass_seconds * passed if hooks.rows_passed else 0.0,
        test_seconds=scoring_seconds(few, more, stream),
        device=hooks.device,
        world=trainer.world_size,
        parameters=sum(p.numel() for p in module.model.parameters()),
        learning=_learning(module),
        peak_memory_bytes=hooks.peak_memory_bytes,
        task_bytes=kept,
        last_bytes=kept + sum(size_of(optimizer.state) for optimizer in trainer.optimizers),
        remembered_bytes=module.strategy.bytes_remembered(),
        remembered_rows=hooks.rows_passed,
        faults=tuple(dict.fromkeys([*few.faults, *hooks.faults])),
        test_bytes=scoring_bytes(few, more, stream, data.test_batch),
        test_batch=data.test_batch,
    )


def _learning(module: ContinualModule) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad) if module.learns else 0


def size_of(state: Any) -> int:
    """Return the bytes of all tensors in nested mappings and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, Mapping):
        return sum(size_of(value) for value in state.values())
    return sum(size_of(value) for value in state) if isinstance(state, list | tuple) else 0


class _Watch(StrategyHooks):
    """The strategy's hooks, timed; its pass at the end of the task is cut short."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[float] = []
        self.faults: list[str] = []
        self.rows_passed, self.pass_seconds = 0, 0.0
        self.peak_memory_bytes, self.device = 0, "cpu"

    @property
    def step_seconds(self) -> float:
        """Of the faster step; the first one also warms up."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return min((end - start for start, end in pairs), default=0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.device = str(pl_module.device)
        self.marks.append(time.monotonic())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.faults += batch.faults
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
            self.marks.append(time.monotonic())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start = time.monotonic()
        super().on_train_end(trainer, pl_module)
        self.pass_seconds = time.monotonic() - start
        self.peak_memory_bytes = peak_memory(pl_module.device)

    def _pass(self, trainer: pl.Trainer) -> Iterable[Batch]:
        return _FirstBatches(super()._pass(trainer), self)


class _FirstBatches:
    """The first batches of a pass; counts the rows that are asked for."""

    def __init__(self, batches: Iterable[Batch], watch: _Watch) -> None:
        self.batches, self.watch = batches, watch

    def __iter__(self) -> Any:
        for batch in islice(self.batches, PASS_BATCHES):
            self.watch.rows_passed += len(batch)
            self.watch.faults += batch.faults
            yield batch

    def __len__(self) -> int:
        return min(PASS_BATCHES, len(self.batches))  # type: ignore[arg-type]


def _train(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer], data: ContinualData
) -> tuple[pl.Trainer, int, _Watch]:
    """Take the two steps; also return how many epochs the configuration asks for."""
    hooks = _Watch()
    data.select(0)
    trainer = make_trainer(callbacks=[hooks], logger=False, **OWN_SETTINGS)
    epochs = max(1, trainer.max_epochs or 1)
    trainer.fit_loop.max_epochs = 1
    trainer.accumulate_grad_batches = data.accumulation(trainer.world_size)
    trainer.limit_train_batches = STEPS * trainer.accumulate_grad_batches
    module.train()
    trainer.fit(module, datamodule=data, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return trainer, epochs, hooks


def _steps(
    module: ContinualModule, data: ContinualData, task: Task, recall: Recall | None, epochs: int
) -> int:  # fmt: skip
    """Reckon the optimiser steps of a task, with what the strategy recalls after the first."""
    if not module.learns:
        return 1
    recalled, share = 0, None
    if recall is not None and task.index:
        share = recall.share
        earlier = sum(old.size for old in data.stream.tasks[: task.index])
        recalled = min(earlier, len(recall)) if share is not None else earlier
    sources = [(data.stream.sources[number - 1].rows.size, part) for number, part in task.mix]
    share = share and (task.share or share)
    mixture = Mixture(task.size, data.global_batch, recalled, share, tuple(sources))
    return (task.epochs or epochs) * mixture.steps
