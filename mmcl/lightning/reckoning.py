"""What scoring will take, reckoned from a few rows of every column and more of some."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmcl.core import TaskStream
from mmcl.lightning.cells import record_cells
from mmcl.lightning.data import ContinualData
from mmcl.lightning.folder import RunFolder
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.sequence import OWN_SETTINGS, SCORES
from mmcl.metrics import AccuracyMatrix


class _Clock(pl.Callback):
    """Times the scoring, without the making of the Trainer, and notes what it takes in memory.

    Attributes:
        seconds: of everything.
        seconds_of: of the batches of each loader.
        peak_bytes: on a GPU, 0 elsewhere.
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
        own = self.seconds_of.setdefault(dataloader_idx, 0.0)
        self.seconds_of[dataloader_idx] = own - time.monotonic()

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
class Scored:
    """Some rows of some columns: their scores, and what it took.

    Attributes:
        matrix: with the scores in row 0.
        rows: of each column.
        seconds: of all of them.
        seconds_of: of each column, its share of these.
        peak_bytes: on a GPU, 0 elsewhere.
        faults: what could not be read.
    """

    matrix: AccuracyMatrix
    rows: dict[int, int]
    seconds: float
    seconds_of: dict[int, float]
    peak_bytes: int
    faults: list[str]


def score_rows(
    module: ContinualModule, make_trainer: Callable[..., pl.Trainer],
    make_data: Callable[[], ContinualData], rows: int, columns: Sequence[int] | None = None,
) -> Scored:  # fmt: skip
    """Score some columns before training, and keep nothing.

    Args:
        module: is given back as it was.
        make_trainer: builds a fresh Trainer from keyword arguments that win over its own.
        make_data: builds the datamodule.
        rows: of each column, at most.
        columns: of the matrix, None = all.
    """
    data = make_data()
    data.limit = rows if data.limit is None or data.limit < 1 else min(rows, int(data.limit))
    data.max_faults = 1.0  # one of so few is a large share; they are named in the result
    data.setup()
    chosen = range(len(data.stream.columns)) if columns is None else columns
    matrix = AccuracyMatrix.for_stream(data.stream, SCORES)
    clock = _Clock()
    trainer = make_trainer(callbacks=[clock], logger=False, **OWN_SETTINGS)
    nowhere = RunFolder(Path(), writes=False)
    faults = record_cells(module, data, trainer, matrix, nowhere, 0, chosen)
    counts = {column: data.stream.column(column).test_size for column in chosen}
    whole = sum(clock.seconds_of.values()) or 1.0
    seconds = {
        column: clock.seconds * clock.seconds_of.get(place, 0.0) / whole
        for place, column in enumerate(chosen)
    }
    return Scored(matrix, counts, clock.seconds, seconds, clock.peak_bytes, faults)


def unlike_columns(stream: TaskStream) -> list[int]:
    """Return the first column of each kind whose rows cost the same."""
    return sorted(set(_first_alike(stream).values()))


def _first_alike(stream: TaskStream) -> dict[int, int]:
    """Map every column to the first one whose rows cost the same: the longest answer decides."""
    first: dict[tuple[object, ...], int] = {}
    found = {}
    for place, task in enumerate(stream.columns):
        cost: tuple[object, ...] = (task.kind,)
        if task.kind == "answer":
            is_free = task.decode == "generate"
            cost += (task.decode, task.max_new_tokens if is_free else len(task.classes))
        found[place] = first.setdefault(cost, place)
    return found


def scoring_seconds(few: Scored, more: Scored, stream: TaskStream) -> float:
    """Reckon the whole matrix: a row costs what it did among more, a cell what few took beside.

    Answers are long before training, so where they are generated this is rather too much.
    """
    alike = _first_alike(stream)
    row = {place: more.seconds_of[place] / more.rows[place] for place in more.rows}
    among_few = sum(row[alike[place]] * count for place, count in few.rows.items())
    cell = max(0.0, (few.seconds - among_few) / len(few.rows))
    full = sum(row[alike[place]] * task.test_size for place, task in enumerate(stream.columns))
    return (len(stream) + 1) * (len(stream.columns) * cell + full)


def scoring_bytes(few: Scored, more: Scored, stream: TaskStream, test_batch: int) -> int:
    """Reckon what generating for ``test_batch`` rows at once takes on a GPU, 0 if not known."""
    most, least = max(more.rows.values()), max(few.rows.values())
    rows = min(test_batch, max(task.test_size for task in stream.columns))
    is_generated = any(task.kind == "answer" for task in stream.columns)
    if not is_generated or not more.peak_bytes or rows <= most or most <= least:
        return 0
    each = max(0, more.peak_bytes - few.peak_bytes) / (most - least)
    return int(more.peak_bytes + each * (rows - most))
