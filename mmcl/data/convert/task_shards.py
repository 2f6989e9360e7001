"""Shard plans of converted tasks; each shard can be written by any process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmcl.data.convert.options import ConvertOptions
from mmcl.data.convert.record import Chunk, Record
from mmcl.data.convert.task_split import SplitSamples, TaskSplits, shard_slices
from mmcl.data.protocols import IntArray
from mmcl.data.shards.json_shard import sample_key
from mmcl.data.writing.card_writer import card_task
from mmcl.data.writing.shard_writer import Sample, ShardPlan


@dataclass(frozen=True)
class PlannedTask:
    """Shard plans of a task.

    Attributes:
        entry: of the card.
        train: plans of its training shards.
        test: plans of its test shards.
    """

    entry: dict[str, Any]
    train: Sequence[ShardPlan]
    test: Sequence[ShardPlan]


@dataclass(frozen=True)
class _ShardChunk:
    """Records of one shard from one chunk.

    Attributes:
        records: chunk of these k records.
        numbers: (k,) of the records in their input.
        labels: (k,) class ids; None if there are no classes.
    """

    records: Chunk
    numbers: IntArray
    labels: IntArray | None


def unique_names(names: Sequence[str]) -> list[str]:
    """Return a unique prefix of file names and keys for each task."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-") or "task"
        stem, number = plain, 2
        while stem in found:
            stem, number = f"{plain}-{number}", number + 1
        found.append(stem)
    return found


def plan_task(stem: str, task: TaskSplits, options: ConvertOptions) -> PlannedTask:
    """Return the shard plans of a task."""
    train = _plans(f"{stem}-train", task.train, options, bool(task.classes))
    test = _plans(f"{stem}-test", task.test, options, bool(task.classes))
    fields = {"classes": list(task.classes)} if task.classes else {}
    return PlannedTask(card_task(task.name, train, test, **fields), train, test)


def _plans(
    stem: str, hand: SplitSamples, options: ConvertOptions, has_labels: bool
) -> list[ShardPlan]:
    inputs = hand.scan.source.chunks
    ends = np.cumsum([len(chunk) for chunk in inputs])
    sizes = hand.scan.size[hand.numbers]
    plans = []
    for number, own in enumerate(shard_slices(sizes, options.shard_samples, options.shard_bytes)):
        order = own.start + np.argsort(hand.numbers[own], kind="stable")
        numbers = hand.numbers[order]
        labels = hand.labels[order] if has_labels else None
        samples = _Samples(stem, inputs, ends, numbers, labels)
        plans.append(ShardPlan(f"{stem}-{number:05d}.tar", len(numbers), samples))
    return plans


@dataclass(frozen=True)
class _Samples:
    """Samples of one shard; pickled as only the chunks that the shard needs."""

    stem: str
    inputs: Sequence[Chunk]
    ends: IntArray
    numbers: IntArray
    labels: IntArray | None

    def __call__(self) -> Iterator[Sample]:
        return _samples(self.stem, self.chunks())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_samples, self.stem, list(self.chunks()))

    def chunks(self) -> Iterator[_ShardChunk]:
        which = np.searchsorted(self.ends, self.numbers, side="right")
        bounds = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(which)]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            number = int(which[first])
            chunk = self.inputs[number]
            own = self.numbers[first:last]
            indices = own - (int(self.ends[number]) - len(chunk))
            labels = None if self.labels is None else self.labels[first:last]
            yield _ShardChunk(chunk.subset(indices), own, labels)


def _samples(stem: str, chunks: Iterable[_ShardChunk]) -> Iterator[Sample]:
    for chunk in chunks:
        for index, record in enumerate(chunk.records.read()):
            if not isinstance(record, Record):
                raise RuntimeError(
                    f"{record.name or 'a sample'} changed while the stream was written "
                    f"({record.reason}): run the same command again"
                )
            key = sample_key(stem, int(chunk.numbers[index]), record.name)
            label = {} if chunk.labels is None else {"cls": str(int(chunk.labels[index]))}
            yield {"__key__": key, **record.members, **label}
