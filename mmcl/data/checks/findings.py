"""What a check of a stream found: faults, remarks, and what every part of every task holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mmcl.core import Task, TaskStream

Value = TypeVar("Value")
Size = tuple[int, int]


@dataclass(frozen=True)
class PartFindings:
    """What the training or the test part of a task holds.

    Attributes:
        shards: that it has.
        counted: shards in which its samples were counted.
        samples: in them.
        looked: samples that were looked into; all the rest is about these.
        bad: of them cannot be read.
        size_bytes: of the counted shards, in all.
        labels: samples of each of the task's classes, in the order of ``TaskFindings.classes``.
        sizes: smallest, median and largest picture as (width, height); None without pictures.
        lengths: median and largest number of letters of a text; None without texts.
        answers: the most frequent right answers and how often each comes.
    """

    shards: int = 0
    counted: int = 0
    samples: int = 0
    looked: int = 0
    bad: int = 0
    size_bytes: int = 0
    labels: tuple[int, ...] = ()
    sizes: tuple[Size, Size, Size] | None = None
    lengths: tuple[int, int] | None = None
    answers: tuple[tuple[str, int], ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether every sample of every shard was looked into, so that what is absent is absent."""
        return self.counted == self.shards and self.looked == self.samples > 0


@dataclass(frozen=True)
class TaskFindings:
    """What a task holds.

    Attributes:
        task: as on the card.
        classes: names of all its classes, new or not.
        train: its training part; None for a probe.
        test: its test part; None for a source.
    """

    task: Task
    classes: tuple[str, ...]
    train: PartFindings | None
    test: PartFindings | None

    @property
    def role(self) -> str:
        """Say whether it is a task, a probe or a source."""
        return "source" if self.task.index < 0 else "probe" if self.task.is_probe else "task"

    @property
    def parts(self) -> tuple[PartFindings, ...]:
        """Those that it has."""
        return tuple(part for part in (self.train, self.test) if part is not None)


@dataclass(frozen=True)
class StreamFindings:
    """What a check found.

    Attributes:
        name: of the stream.
        stream: as its card says; None if the card itself has faults.
        faults: what keeps the stream from being used, a line each; few of a sort in full.
        remarks: what is worth knowing and no fault.
        tasks: every task, then every probe and every source.
    """

    name: str
    stream: TaskStream | None
    faults: tuple[str, ...]
    remarks: tuple[str, ...]
    tasks: tuple[TaskFindings, ...]

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON."""
        return {
            "stream": self.name,
            "is_good": not self.faults,
            "faults": list(self.faults),
            "remarks": list(self.remarks),
            "tasks": [
                {
                    "name": each.task.name,
                    "kind": each.task.kind,
                    "role": each.role,
                    "train": None if each.train is None else _plain(each.train, each.classes),
                    "test": None if each.test is None else _plain(each.test, each.classes),
                }
                for each in self.tasks
            ],
        }


def everything_in(stream: TaskStream) -> tuple[Task, ...]:
    """Return tasks, probes, and the rows of sources as tasks of index -1, -2 and so on."""
    sources = (replace(each.rows, index=-each.number) for each in stream.sources)
    return (*stream.columns, *sources)


def called(task: Task) -> str:
    """Name a task, probe or source as messages do."""
    return f"source '{task.name}'" if task.index < 0 else f"task '{task.name}'"


def class_names(stream: TaskStream, task: Task) -> tuple[str, ...]:
    """Return the names of all classes of a task, in the order of its ``labels``."""
    names = task.classes if task.is_probe else stream.classes_until(max(0, task.index))
    return tuple(names[column] for column in task.labels)


def spread_of(
    counts: Counter[Value], key: Callable[[Value], Any]
) -> tuple[Value, Value, Value] | None:
    """Return the smallest, the median and the largest of counted values, None of none.

    Of an even number the lower of the two in the middle is the median.
    """
    if not counts:
        return None
    ordered = sorted(counts, key=key)
    before, middle = 0, (sum(counts.values()) - 1) // 2
    for value in ordered:
        before += counts[value]
        if before > middle:
            return ordered[0], value, ordered[-1]
    raise ValueError("a count is negative")


def _plain(part: PartFindings, classes: tuple[str, ...]) -> dict[str, Any]:
    names = ("smallest", "median", "largest")
    return {
        "shards": part.shards,
        "samples": part.samples,
        "looked_into": part.looked,
        "bad": part.bad,
        "bytes": part.size_bytes,
        "classes": dict(zip(classes, part.labels, strict=True)) if part.labels else {},
        "pictures": dict(zip(names, map(list, part.sizes), strict=True)) if part.sizes else {},
        "letters": dict(zip(names[1:], part.lengths, strict=True)) if part.lengths else {},
        "answers": dict(part.answers),
    }
