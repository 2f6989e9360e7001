"""Passes that see every sample once and in order: the test parts, and the pass of ``end_task``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import Batch, Task, Transform
from mmcl.core.randomness import mix, ranks_of
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.faults import BadSample
from mmcl.data.loader import batch_loader
from mmcl.data.prepare import Part, PreparedStream
from mmcl.data.reader import Reader
from mmcl.data.row import MadeRow, collate, make_row
from mmcl.data.shard import Numbers


@dataclass(frozen=True)
class _Found:
    """What a worker made of a batch: None if no row of it could be read."""

    batch: Batch | None
    faults: tuple[str, ...]


class Pass:
    """Batches of one rank, each sample once; can be iterated again and again.

    The samples are cut into global batches of nearly equal size, the same number on every rank, and
    each is dealt by stride. Bad samples are left out and named in ``Batch.faults``. A batch without
    a readable row is left out as well and its faults go to a neighbour, so a pass may give fewer
    batches than its length.

    Args:
        loader: gives what was found, batch by batch.
        name: of the part, for messages.
    """

    def __init__(self, loader: DataLoader[Batch], name: str) -> None:
        self.loader = loader
        self.name = name

    def __len__(self) -> int:
        """Return the number of batches if every one has a readable row."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        waiting: Batch | None = None
        faults: tuple[str, ...] = ()
        for found in self.loader:
            faults += found.faults
            if found.batch is not None:
                if waiting is not None:
                    yield waiting
                waiting, faults = replace(found.batch, faults=faults), ()
        if waiting is not None:
            yield replace(waiting, faults=waiting.faults + faults)
        elif faults:
            raise ValueError(
                f"no sample of {self.name} could be read, {faults[0]} for one: repair its shards"
            )


class _OrderedRows(Dataset[Batch]):
    """Reads the samples it is asked for and leaves out bad ones."""

    def __init__(
        self, reader: Reader, task: Task, transform: Transform, seed: int, max_pixels: int
    ) -> None:
        self.reader = reader
        self.task = task
        self.transform = transform
        self.seed = seed
        self.max_pixels = max_pixels

    def __getitems__(self, numbers: Numbers) -> _Found:
        return self.make(numbers)

    def make(self, numbers: Numbers, room: Tensor | None = None) -> _Found:
        rows: list[MadeRow] = []
        faults: list[str] = []
        for number in numbers.tolist():
            try:
                sample, seed = self.reader.read(number), mix(self.seed, self.task.index, number)
                made = make_row(
                    sample, number, self.task, self.transform, seed=seed, max_pixels=self.max_pixels
                )
                rows.append(made)
            except BadSample as bad:
                faults.append(f"{self.reader.where(number)}: {bad}")
        return _Found(collate(rows, room=room) if rows else None, tuple(faults))


class _Strides(Sampler[Numbers]):
    """One rank's share of each global batch of an ordered pass."""

    def __init__(self, numbers: range | Numbers, batch: int, rank: int, world: int) -> None:
        self.numbers = numbers
        self.steps = -(-len(numbers) // (batch * world))
        self.rank = rank
        self.world = world

    def _share(self, step: int) -> Numbers:
        start, end = (edge * len(self.numbers) // self.steps for edge in (step, step + 1))
        return np.asarray(self.numbers[start + self.rank : end : self.world], dtype=np.int64)

    def __len__(self) -> int:
        return sum(len(self._share(step)) > 0 for step in range(self.steps))

    def __iter__(self) -> Iterator[Numbers]:
        shares = (self._share(step) for step in range(self.steps))
        return (share for share in shares if len(share))


def test_loader(
    prepared: PreparedStream,
    column: int,
    transform: Transform,
    *,
    batch: int,
    rank: int = 0,  # noqa: PT028
    world: int = 1,  # noqa: PT028
    workers: int = 0,  # noqa: PT028
    max_pixels: int = MAX_PIXELS,  # noqa: PT028
) -> Pass:
    """Return the ordered pass over the test part of a task or probe.

    Args:
        prepared: the stream.
        column: of the matrix: a task, or a probe after the tasks.
        transform: of the model, not augmenting.
        batch: rows of one rank's batch, at most.
        rank: of this process.
        world: number of processes.
        workers: processes that read and decode.
        max_pixels: larger pictures are bad samples.
    """
    return _ordered(
        prepared, column, "test", transform, batch, rank, world, workers, max_pixels
    )  # fmt: skip


def pass_loader(
    prepared: PreparedStream,
    task: int,
    transform: Transform,
    *,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    max_pixels: int = MAX_PIXELS,
    few: int | None = None,
) -> Pass:
    """Return an ordered pass over the training part of a task, for the hooks of a strategy.

    Args:
        prepared: the stream.
        task: index of the task.
        transform: of the model, not augmenting.
        batch: rows of one rank's batch, at most.
        rank: of this process.
        world: number of processes.
        workers: processes that read and decode.
        max_pixels: larger pictures are bad samples.
        few: samples to see at most, a uniform part of the task; None = all.
    """
    return _ordered(
        prepared, task, "train", transform, batch, rank, world, workers, max_pixels, few
    )  # fmt: skip


def _ordered(
    prepared: PreparedStream, column: int, part: Part, transform: Transform,
    batch: int, rank: int, world: int, workers: int, max_pixels: int, few: int | None = None,
) -> Pass:  # fmt: skip
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    task, reader = prepared.stream.column(column), prepared.reader(column, part)
    rows = _OrderedRows(reader, task, transform, 0, max_pixels)
    numbers: range | Numbers = range(len(reader))
    if few is not None and few < len(reader):
        ranks = ranks_of(0, column, torch.arange(len(reader)))
        numbers = ranks.topk(few, largest=False).indices.sort().values.numpy()
    strides = _Strides(numbers, batch, rank, world)
    return Pass(
        batch_loader(rows, strides, workers, seed=0, stay=False),
        f"the {part} part of '{task.name}'",
    )


# Linters and pytest take a function whose name begins so for a test.
test_loader.__test__ = False  # type: ignore[attr-defined]
