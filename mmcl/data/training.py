"""The rows of a training batch, read where they lie; a bad sample keeps its slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.utils.data import Dataset

from mmcl.core import Batch, Task, Transform
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
    """What a worker is asked for: the entries of one micro-batch, see ``EpochPlan.entries``."""

    epoch: int
    entries: Numbers
    weight: float


@dataclass(frozen=True)
class Recalled:
    """The recalled list as arrays, and where its samples lie."""

    task: Numbers
    sample: Numbers
    readers: Mapping[int, SampleReader]


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
        old = {int(place) for place in recalled.task}
        self.tasks: dict[int, Task] = {j: prepared.stream.tasks[j] for j in {*old, task}}
        self.reader = prepared.reader(task, "train")
        self.task = task
        self.transform = transform
        self.recalled = recalled
        self.seed = seed
        self.max_pixels = max_pixels

    def __getitems__(self, request: Request) -> Batch:
        """Read, decode and put together one micro-batch."""
        faults: list[str] = []
        rows = [self._row(int(entry), request.epoch, faults) for entry in request.entries]
        return collate(rows, faults, request.weight)

    def _row(self, entry: int, epoch: int, faults: list[str]) -> MadeRow:
        """Make the row of an entry, or of the first of its stand-ins that can be read."""
        first = entry
        task, number, _ = self._found(first)
        own: list[str] = []
        for attempt in range(1, MAX_STAND_INS + 1):
            try:
                made = self._made(entry, epoch)
            except BadSample as bad:
                _, sample, reader = self._found(entry)
                own.append(f"{reader.where(sample)}: {bad}")
                entry = self._stand_in(first, mix(self.seed, task, number, attempt))
            else:
                faults.extend(dict.fromkeys(own))
                return made
        raise ValueError(
            f"{MAX_STAND_INS} samples in a row could not be read in task "
            f"'{self.tasks[task].name}', the last is {own[-1]}; repair its shards"
        )

    def _found(self, entry: int) -> tuple[int, int, SampleReader]:
        """Return the task and number of an entry, and where to read it."""
        if entry < len(self.reader):
            return self.task, entry, self.reader
        place = entry - len(self.reader)
        task = int(self.recalled.task[place])
        return task, int(self.recalled.sample[place]), self.recalled.readers[task]

    def _made(self, entry: int, epoch: int) -> MadeRow:
        task, sample, reader = self._found(entry)
        is_recalled = entry >= len(self.reader)
        seed = mix(self.seed, task, sample, epoch, *([self.task] if is_recalled else []))
        return make_row(
            reader.read(sample), sample, self.tasks[task], self.transform,
            seed=seed, max_pixels=self.max_pixels, is_recalled=is_recalled,
        )  # fmt: skip

    def _stand_in(self, entry: int, draw: int) -> int:
        """Return another entry: a new one for a new one, a recalled one for a recalled one."""
        new = len(self.reader)
        return draw % new if entry < new else new + draw % len(self.recalled.task)
