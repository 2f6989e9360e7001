"""Training dataset: reads and decodes the samples of a batch; a bad sample is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmcl.core import IGNORE_INDEX, Batch, DataSource, Task, Transform
from mmcl.core.seeding import hash_seed
from mmcl.data.batches.collate import Example, collate, make_example
from mmcl.data.errors import BadSample
from mmcl.data.protocols import IntArray
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import SampleReader

MAX_REPLACEMENTS = 100
"""Number of samples tried for one slot, all of them bad, before the run ends."""


@dataclass(frozen=True)
class BatchRequest:
    """Request for one micro-batch, sent to a worker.

    Attributes:
        epoch: from 0.
        entries: samples of the micro-batch, see ``EpochPlan``.
        loss_weight: see ``Batch.loss_weight``.
    """

    epoch: int
    entries: IntArray
    loss_weight: float


@dataclass(frozen=True)
class ReplaySamples:
    """Replay list as arrays (task and number of each sample), with a reader for each task."""

    task_ids: IntArray
    sample_ids: IntArray
    readers: Mapping[int, SampleReader]


@dataclass(frozen=True)
class SampleLocation:
    """Location of the sample of an entry.

    Attributes:
        rows: task or source that says what the sample's members mean.
        number: number of the sample in it.
        reader: reader of its samples.
        source: number of the source, 0 = the task or the replay list.
        is_recalled: whether it is a replayed sample.
    """

    rows: Task
    number: int
    reader: SampleReader
    source: int = 0
    is_recalled: bool = False


class TrainDataset(Dataset[Batch]):
    """Dataset of training batches; a bad sample is replaced by a seeded draw of the same kind.

    Args:
        prepared: the stream.
        task: index of the task that is trained.
        transform: the model's transform.
        recalled: the replay list.
        seed: seed of the run.
        max_pixels: largest image that is decoded.
    """

    def __init__(
        self,
        prepared: OpenStream,
        task: int,
        transform: Transform,
        recalled: ReplaySamples,
        *,
        seed: int,
        max_pixels: int,
    ) -> None:
        stream = prepared.stream
        old = {int(index) for index in recalled.task_ids}
        self.tasks: dict[int, Task] = {j: stream.tasks[j] for j in {*old, task}}
        self.reader = prepared.reader(task, "train")
        self.task = task
        self.transform = transform
        self.recalled = recalled
        self.seed = seed
        self.max_pixels = max_pixels
        self.sources: list[DataSource] = [
            stream.sources[n - 1] for n, _ in stream.tasks[task].mixture
        ]
        self.source_readers = [prepared.source_reader(source.number) for source in self.sources]
        counts = [len(self.reader), len(recalled.task_ids), *map(len, self.source_readers)]
        self._starts = [sum(counts[:kind]) for kind in range(len(counts) + 1)]
        self._classes_seen = 1 + max(
            (c for t in stream.tasks[: task + 1] for c in t.class_ids), default=-1
        )

    @property
    def counts(self) -> Sequence[int]:
        """Number of samples of the task, of the replay list, and of each source."""
        return [end - start for start, end in zip(self._starts, self._starts[1:], strict=False)]

    def scored(self, entries: IntArray) -> int:
        """Return how many entries are in the task loss."""
        if all(source.in_loss for source in self.sources):
            return len(entries)
        kinds = np.searchsorted(self._starts[1:-1], entries, side="right")
        in_loss = np.array([True, True, *(source.in_loss for source in self.sources)])
        return int(in_loss[kinds].sum())

    def __getitems__(self, request: BatchRequest) -> Batch:
        """Read, decode and collate one micro-batch."""
        return self.make(request)

    def make(self, request: BatchRequest, room: Tensor | None = None) -> Batch:
        """Read, decode and collate one micro-batch, its images in the buffer ``room``."""
        errors: list[str] = []
        examples = [self._example(int(entry), request.epoch, errors) for entry in request.entries]
        return collate(examples, errors, request.loss_weight, room)

    def _example(self, entry: int, epoch: int, errors: list[str]) -> Example:
        """Make the example of an entry, or of the first of its replacements that can be read."""
        first = location = self._location(entry)
        own: list[str] = []
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                example = self._made(location, epoch)
            except BadSample as bad:
                own.append(f"{location.reader.describe(location.number)}: {bad}")
                draw = hash_seed(self.seed, first.rows.index - first.source, first.number, attempt)
                location = self._location(self._replacement(entry, draw))
            else:
                errors.extend(dict.fromkeys(own))
                return example
        raise ValueError(
            f"{MAX_REPLACEMENTS} samples in a row could not be read in "
            f"{'source' if first.source else 'task'} '{first.rows.name}', the last is {own[-1]}; "
            "repair its shards"
        )

    def _kind(self, entry: int) -> int:
        """Return 0 for a new sample, 1 for a replayed one, 1 + n for one of the n-th source."""
        if entry < self._starts[1]:
            return 0
        return next(k for k in range(1, len(self._starts)) if entry < self._starts[k + 1])

    def _location(self, entry: int) -> SampleLocation:
        kind = self._kind(entry)
        number = entry - self._starts[kind]
        if kind == 0:
            return SampleLocation(self.tasks[self.task], number, self.reader)
        if kind == 1:
            task = int(self.recalled.task_ids[number])
            reader = self.recalled.readers[task]
            sample = int(self.recalled.sample_ids[number])
            return SampleLocation(self.tasks[task], sample, reader, is_recalled=True)
        source = self.sources[kind - 2]
        return SampleLocation(source.task, number, self.source_readers[kind - 2], source.number)

    def _made(self, location: SampleLocation, epoch: int) -> Example:
        group = location.rows.index - location.source
        is_new = not (location.is_recalled or location.source)
        seed = hash_seed(self.seed, group, location.number, epoch, *([] if is_new else [self.task]))
        example = make_example(
            location.reader.read(location.number), location.number, location.rows, self.transform,
            seed=seed, max_pixels=self.max_pixels, is_recalled=not is_new,
        )  # fmt: skip
        return self._of_source(example, location.source) if location.source else example

    def _of_source(self, example: Example, number: int) -> Example:
        """Mark an example of a source; outside of the loss or of an unseen class: no label."""
        in_loss = self.sources[[s.number for s in self.sources].index(number)].in_loss
        example = replace(example, source_id=number, in_loss=in_loss)
        if not in_loss and example.processed.labels is not None:
            labels = torch.full_like(example.processed.labels, IGNORE_INDEX)
            example = replace(example, processed=replace(example.processed, labels=labels))
        if not in_loss or example.label >= self._classes_seen:
            example = replace(example, label=IGNORE_INDEX)
        return example

    def _replacement(self, entry: int, draw: int) -> int:
        """Return another entry of the same kind; ``draw`` chooses it."""
        kind = self._kind(entry)
        return self._starts[kind] + draw % self.counts[kind]
