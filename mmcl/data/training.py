"""The rows of a training batch, read where they lie; a bad sample keeps its slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmcl.core import UNSCORED, Batch, Source, Task, Transform
from mmcl.core.randomness import mix
from mmcl.data.faults import BadSample
from mmcl.data.prepare import PreparedStream
from mmcl.data.reader import SampleReader
from mmcl.data.row import MadeRow, collate, make_row
from mmcl.data.shard import Numbers

MAX_STAND_INS = 100
"""Bad samples met in a row, in place of one, before the run ends."""


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: the entries of one micro-batch, see ``EpochPlan``."""

    epoch: int
    entries: Numbers
    weight: float


@dataclass(frozen=True)
class Recalled:
    """The recalled list as arrays, and where its samples lie."""

    task: Numbers
    sample: Numbers
    readers: Mapping[int, SampleReader]


@dataclass(frozen=True)
class Place:
    """Where an entry is found.

    Attributes:
        rows: task or source, for what its members mean.
        number: of the sample inside it.
        reader: of its samples.
        source: 0 = the task or memory.
        is_recalled: whether it is remembered.
    """

    rows: Task
    number: int
    reader: SampleReader
    source: int = 0
    is_recalled: bool = False


class TrainingRows(Dataset[Batch]):
    """Makes the batch of a request; a bad sample is replaced by the next of a seeded list.

    Args:
        prepared: the stream.
        task: index of the task that is learned.
        transform: of the model.
        recalled: the old samples.
        seed: of the run.
        max_pixels: largest picture that is decoded.
    """

    def __init__(
        self,
        prepared: PreparedStream,
        task: int,
        transform: Transform,
        recalled: Recalled,
        *,
        seed: int,
        max_pixels: int,
    ) -> None:
        stream = prepared.stream
        old = {int(place) for place in recalled.task}
        self.tasks: dict[int, Task] = {j: stream.tasks[j] for j in {*old, task}}
        self.reader = prepared.reader(task, "train")
        self.task = task
        self.transform = transform
        self.recalled = recalled
        self.seed = seed
        self.max_pixels = max_pixels
        self.sources: list[Source] = [stream.sources[n - 1] for n, _ in stream.tasks[task].mix]
        self.source_readers = [prepared.source_reader(source.number) for source in self.sources]
        counts = [len(self.reader), len(recalled.task), *map(len, self.source_readers)]
        self._starts = [sum(counts[:place]) for place in range(len(counts) + 1)]
        self._known = 1 + max((c for t in stream.tasks[: task + 1] for c in t.labels), default=-1)

    @property
    def counts(self) -> Sequence[int]:
        """Samples of the task, recalled ones, and those of each source."""
        return [end - start for start, end in zip(self._starts, self._starts[1:], strict=False)]

    def scored(self, entries: Numbers) -> int:
        """Return how many entries have a part in the task loss."""
        if all(source.is_scored for source in self.sources):
            return len(entries)
        kinds = np.searchsorted(self._starts[1:-1], entries, side="right")
        is_scored = np.array([True, True, *(source.is_scored for source in self.sources)])
        return int(is_scored[kinds].sum())

    def __getitems__(self, request: Request) -> Batch:
        """Read, decode and put together one micro-batch."""
        return self.make(request)

    def make(self, request: Request, room: Tensor | None = None) -> Batch:
        """Read, decode and put together one micro-batch, its pictures in ``room``."""
        faults: list[str] = []
        rows = [self._row(int(entry), request.epoch, faults) for entry in request.entries]
        return collate(rows, faults, request.weight, room)

    def _row(self, entry: int, epoch: int, faults: list[str]) -> MadeRow:
        """Make the row of an entry, or of the first of its stand-ins that can be read."""
        first = place = self._found(entry)
        own: list[str] = []
        for attempt in range(1, MAX_STAND_INS + 1):
            try:
                made = self._made(place, epoch)
            except BadSample as bad:
                own.append(f"{place.reader.where(place.number)}: {bad}")
                draw = mix(self.seed, first.rows.index - first.source, first.number, attempt)
                place = self._found(self._stand_in(entry, draw))
            else:
                if own:
                    faults.extend(dict.fromkeys(own))
                return made
        raise ValueError(
            f"{MAX_STAND_INS} samples in a row could not be read in "
            f"{'source' if first.source else 'task'} '{first.rows.name}', the last is {own[-1]}; "
            "repair its shards"
        )

    def _kind(self, entry: int) -> int:
        """Return 0 for a new sample, 1 for a recalled one, 1 + n for one of the n-th source."""
        if entry < self._starts[1]:
            return 0
        return next(k for k in range(1, len(self._starts)) if entry < self._starts[k + 1])

    def _found(self, entry: int) -> Place:
        kind = self._kind(entry)
        number = entry - self._starts[kind]
        if kind == 0:
            return Place(self.tasks[self.task], number, self.reader)
        if kind == 1:
            task = int(self.recalled.task[number])
            reader = self.recalled.readers[task]
            sample = int(self.recalled.sample[number])
            return Place(self.tasks[task], sample, reader, is_recalled=True)
        source = self.sources[kind - 2]
        return Place(source.rows, number, self.source_readers[kind - 2], source.number)

    def _made(self, place: Place, epoch: int) -> MadeRow:
        own = place.rows.index - place.source
        is_new = not (place.is_recalled or place.source)
        seed = mix(self.seed, own, place.number, epoch, *([] if is_new else [self.task]))
        made = make_row(
            place.reader.read(place.number), place.number, place.rows, self.transform,
            seed=seed, max_pixels=self.max_pixels, is_recalled=not is_new,
        )  # fmt: skip
        return self._of_source(made, place.source) if place.source else made

    def _of_source(self, made: MadeRow, number: int) -> MadeRow:
        """Mark a row of a source; what is not scored, or of a class not met yet, has no label."""
        is_scored = self.sources[[s.number for s in self.sources].index(number)].is_scored
        made = replace(made, source=number, is_scored=is_scored)
        if not is_scored and made.row.labels is not None:
            labels = torch.full_like(made.row.labels, UNSCORED)
            made = replace(made, row=replace(made.row, labels=labels))
        if not is_scored or made.label >= self._known:
            made = replace(made, label=UNSCORED)
        return made

    def _stand_in(self, entry: int, draw: int) -> int:
        """Return another entry of the same kind."""
        kind = self._kind(entry)
        return self._starts[kind] + draw % self.counts[kind]
