"""Results of validating a stream: errors, warnings, and the counts of every split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from mmcl.core import Task, TaskStream

Value = TypeVar("Value")
Size = tuple[int, int]


@dataclass(frozen=True)
class SplitFindings:
    """Counts of the training or test split of a task.

    Attributes:
        shards: number of its shards.
        counted: shards in which its samples were counted.
        samples: number of samples in them.
        decoded: samples that were decoded; everything below is about these.
        bad: samples among them that cannot be read.
        size_bytes: of the counted shards together.
        labels: samples of each of the task's classes, in the order of ``TaskFindings.classes``.
        sizes: smallest, median and largest image as (width, height); None without images.
        lengths: median and largest number of characters of a text; None without texts.
        answers: the most frequent right answers and how often each occurs.
    """

    shards: int = 0
    counted: int = 0
    samples: int = 0
    decoded: int = 0
    bad: int = 0
    size_bytes: int = 0
    labels: tuple[int, ...] = ()
    sizes: tuple[Size, Size, Size] | None = None
    lengths: tuple[int, int] | None = None
    answers: tuple[tuple[str, int], ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether every sample of every shard was decoded, so that a class not found is absent."""
        return self.counted == self.shards and self.decoded == self.samples > 0


@dataclass(frozen=True)
class TaskFindings:
    """Counts of a task, eval-only task or source.

    Attributes:
        task: as on the card.
        classes: names of all its classes, new or not.
        train: its training split; None for an eval-only task.
        test: its test split; None for a source.
    """

    task: Task
    classes: tuple[str, ...]
    train: SplitFindings | None
    test: SplitFindings | None

    @property
    def role(self) -> str:
        """Return "task", "eval-only task" or "source"."""
        own = "eval-only task" if self.task.is_eval_only else "task"
        return "source" if self.task.index < 0 else own

    @property
    def splits(self) -> tuple[SplitFindings, ...]:
        """Its splits, one or two."""
        return tuple(split for split in (self.train, self.test) if split is not None)


@dataclass(frozen=True)
class StreamFindings:
    """Result of validating a stream.

    Attributes:
        name: of the stream.
        stream: as its card says; None if the card cannot be read.
        errors: errors that keep the stream from being used, a line each; few of a sort in full.
        warnings: warnings, a line each.
        tasks: every task, eval-only task and source.
        notes: what is in the stream and not used, a line each.
        num_errors: number of errors, those that are only counted as well.
    """

    name: str
    stream: TaskStream | None
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    tasks: tuple[TaskFindings, ...]
    notes: tuple[str, ...] = ()
    num_errors: int = 0

    @property
    def splits(self) -> tuple[SplitFindings, ...]:
        """The splits of all tasks."""
        return tuple(split for each in self.tasks for split in each.splits)

    def plain(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {
            "stream": self.name,
            "is_good": not self.errors,
            "num_errors": self.num_errors,
            "errors": list(self.errors),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "tasks": [
                {
                    "name": each.task.name,
                    "task_type": each.task.task_type,
                    "role": each.role,
                    "train": None if each.train is None else _plain(each.train, each.classes),
                    "test": None if each.test is None else _plain(each.test, each.classes),
                }
                for each in self.tasks
            ],
        }


def tasks_and_sources(stream: TaskStream) -> tuple[Task, ...]:
    """Return tasks, eval-only tasks, and sources as tasks of index -1, -2 and so on."""
    sources = (replace(each.task, index=-each.number) for each in stream.sources)
    return (*stream.all_tasks, *sources)


def class_names(stream: TaskStream, task: Task) -> tuple[str, ...]:
    """Return the names of all classes of a task, in the order of its ``labels``."""
    names = task.classes if task.is_eval_only else stream.classes_seen(max(0, task.index))
    return stream.display_names(names[column] for column in task.class_ids)


def value_range(
    counts: Counter[Value], key: Callable[[Value], Any]
) -> tuple[Value, Value, Value] | None:
    """Return minimum, median and maximum of counted values, None without any.

    Of an even number of values the median is the lower one in the middle.
    """
    if not counts:
        return None
    ordered = sorted(counts, key=key)
    ends = np.cumsum([counts[value] for value in ordered])
    middle = int(np.searchsorted(ends, (ends[-1] - 1) // 2, side="right"))
    return ordered[0], ordered[middle], ordered[-1]


def _plain(split: SplitFindings, classes: tuple[str, ...]) -> dict[str, Any]:
    names = ("smallest", "median", "largest")
    return {
        "shards": split.shards,
        "samples": split.samples,
        "decoded": split.decoded,
        "bad": split.bad,
        "bytes": split.size_bytes,
        "classes": dict(zip(classes, split.labels, strict=True)) if split.labels else {},
        "images": dict(zip(names, map(list, split.sizes), strict=True)) if split.sizes else {},
        "characters": dict(zip(names[1:], split.lengths, strict=True)) if split.lengths else {},
        "answers": dict(split.answers),
    }
