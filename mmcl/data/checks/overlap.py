"""Test samples that are trained on: told with both names, whichever tasks they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmcl.core import Task, TaskStream
from mmcl.data.checks.findings import called, everything_in
from mmcl.data.checks.part_check import PartSoFar
from mmcl.data.checks.shard_check import NAMED
from mmcl.data.checks.twins import TrainedOn, joined
from mmcl.data.faults import Faults
from mmcl.data.prepare import Part
from mmcl.data.shard import Numbers

Parts = Mapping[tuple[int, Part], PartSoFar]


def tell_overlap(stream: TaskStream, parts: Parts, faults: Faults, remarks: list[str]) -> None:
    """Compare the test samples of every task and probe with all that is trained on.

    The same picture in training and test is a fault; where something is asked of it, the same
    picture and question are. A known picture with another question is a remark.

    Args:
        stream: that is checked.
        parts: (column, part) -> what was found there.
        faults: get a line for each of the first samples of a task, and the number of the others.
        remarks: get a line for each task that asks something else of known pictures.
    """
    learned = _Learned.of(stream, parts)
    tested = [(task, parts[task.index, "test"]) for task in stream.columns
              if (task.index, "test") in parts]  # fmt: skip
    twins = TrainedOn(learned.prints)
    found = [twins.find(joined(part.prints)) for _, part in tested]
    for (task, part), places in zip(tested, found, strict=True):
        _tell_twins(task, part, learned, places, faults)
    del twins
    known = TrainedOn(learned.prints, by_picture=True)
    for (task, part), places in zip(tested, found, strict=True):
        pictures = known.find(joined(part.prints))
        _tell_pictures(task, part, learned, np.where(places < 0, pictures, -1), remarks)


@dataclass(frozen=True)
class _Learned:
    """All training samples of a stream, one part after the other.

    Attributes:
        tasks: that have a training part.
        parts: theirs.
        starts: (parts + 1,) where each begins among the prints.
        prints: (n, 3) of all.
    """

    tasks: Sequence[Task]
    parts: Sequence[PartSoFar]
    starts: Numbers
    prints: np.ndarray

    @classmethod
    def of(cls, stream: TaskStream, parts: Parts) -> _Learned:
        tasks = [task for task in everything_in(stream) if (task.index, "train") in parts]
        own = [parts[task.index, "train"] for task in tasks]
        sizes = [sum(map(len, part.prints)) for part in own]
        starts = np.cumsum([0, *sizes], dtype=np.int64)
        return cls(tasks, own, starts, joined([each for part in own for each in part.prints]))

    def sample_name(self, place: int) -> str:
        number = int(np.searchsorted(self.starts, place, side="right")) - 1
        own = self.parts[number].sample_name(place - int(self.starts[number]))
        return f"{own} of {called(self.tasks[number])}"


def _tell_twins(
    task: Task, part: PartSoFar, learned: _Learned, places: Numbers, faults: Faults
) -> None:
    rows = np.flatnonzero(places >= 0)
    same = "picture and question" if task.kind == "answer" else "picture"
    for row in rows[:NAMED].tolist():
        faults.add(
            f"{called(task)} (test): {part.sample_name(row)} is trained on, it has the {same} "
            f"of {learned.sample_name(int(places[row]))}: take it out of one of them"
        )
    if len(rows) > NAMED:
        faults.add(f"and {len(rows) - NAMED} more test samples of '{task.name}' are trained on")


def _tell_pictures(
    task: Task, part: PartSoFar, learned: _Learned, places: Numbers, remarks: list[str]
) -> None:
    rows = np.flatnonzero(places >= 0)
    if len(rows):
        first = int(rows[0])
        remarks.append(
            f"{len(rows):,} test samples of {called(task)} ask something else of a picture "
            f"that is trained on, such as {part.sample_name(first)} and "
            f"{learned.sample_name(int(places[first]))}"
        )
