"""Metrics per class: accuracy after every task, forgetting, and the confusion matrix.

They are counted from the predictions of the stream's classification tasks. Eval-only tasks have
classes of their own and are never learned, and generated answers have no closed set of classes;
neither is counted. A test sample counts for its class in the tasks learned so far, so after
T tasks the accuracy of a class is over the same samples in every row. Where all tasks share their
classes, the samples of a class are those of all learned tasks together.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

from mmcl.evaluation import strict_json
from mmcl.evaluation.continual_metrics import MetricValue, Undefined, row_of
from mmcl.evaluation.matrix import AccuracyMatrix, Cell

Confusions = Mapping[Cell, Mapping[tuple[str, str], int]]
"""Cell (row, column) of the accuracy matrix -> (target, predicted class) -> test samples."""

_NO_SAMPLE = "the class has no test sample"
_ACCURACY = "right / test samples of the class in the tasks learned so far"
_LEARNING = "the same, each sample right or wrong just after its task was learned"
_FORGETTING = (
    "mean over the tasks i < T that have the class of (max over l in i..T-1 of c[l][i] - c[T][i]), "
    "c[t][i] = accuracy of the class on task i after task t, not clamped"
)


@dataclass(frozen=True)
class ClassMetrics:
    """Metrics of one class after T tasks; undefined ones hold the reason.

    Args:
        name: of the class.
        tasks: learned tasks whose test part has the class, in training order; empty if none has.
        samples: test samples of the class in these tasks.
        accuracies: one per row, 0 (before training) to T.
        learning: accuracy when each of its tasks was just learned.
        forgetting: best earlier accuracy minus the accuracy now, negative if it improved.
        confused_with: wrong predictions after task T and their numbers, most frequent first.
    """

    name: str
    tasks: tuple[str, ...]
    samples: int
    accuracies: tuple[MetricValue, ...]
    learning: MetricValue
    forgetting: MetricValue
    confused_with: tuple[tuple[str, int], ...]

    @property
    def final(self) -> MetricValue:
        """Accuracy after task T."""
        return self.accuracies[-1]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why metrics are undefined, each reason once."""
        every = (*self.accuracies, self.learning, self.forgetting)
        return tuple(dict.fromkeys(each.reason for each in every if each.reason is not None))


@dataclass(frozen=True)
class ConfusionMatrix:
    """Confusion matrix: how often samples of a class (row) are predicted as a class (column).

    Args:
        classes: names (K) by first task and name, or of groups of classes.
        tasks: (K) first task of each class, "" if no test part has it.
        counts: (row, column) -> test samples; pairs that never occur are left out.
    """

    classes: tuple[str, ...]
    tasks: tuple[str, ...]
    counts: Mapping[tuple[int, int], int]

    @property
    def rows(self) -> list[list[int]]:
        """All K x K counts."""
        every = range(len(self.classes))
        return [[self.counts.get((row, column), 0) for column in every] for row in every]

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last + 1 class of each task; empty for one task, or one class per task."""
        starts = [n for n, task in enumerate(self.tasks) if n == 0 or task != self.tasks[n - 1]]
        ends = [*starts[1:], len(self.tasks)]
        runs = [(s, end) for s, end in zip(starts, ends, strict=False) if self.tasks[s]]
        return runs if 1 < len(runs) < sum(map(bool, self.tasks)) else []

    def group(self, most: int) -> ConfusionMatrix:
        """Sum neighboring classes if there are more than ``most``: by task, else evenly."""
        count = len(self.classes)
        if count <= most:
            return self
        by_task: dict[str, list[int]] = {}
        for index, task in enumerate(self.tasks):
            by_task.setdefault(task, []).append(index)
        if 1 < len(by_task) <= most:
            groups = list(by_task.values())
            names = [f"{task or 'no test sample'} ({len(own)})" for task, own in by_task.items()]
        else:
            size = -(-count // most)
            groups = [list(range(n, min(n + size, count))) for n in range(0, count, size)]
            names = [f"{self.classes[own[0]]} … {self.classes[own[-1]]}" for own in groups]
        group_of = {index: n for n, own in enumerate(groups) for index in own}
        counts: Counter[tuple[int, int]] = Counter()
        for (row, column), samples in self.counts.items():
            counts[group_of[row], group_of[column]] += samples
        return ConfusionMatrix(tuple(names), tuple(self.tasks[own[0]] for own in groups), counts)


def read_confusions(path: Path) -> Counter[tuple[str, str]]:
    """Count the (target, predicted class) pairs of a predictions file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the line, if one is not a prediction.
    """
    # A tenth of the time of read_predictions: a run may have millions of lines.
    counts: Counter[tuple[str, str]] = Counter()
    for number, line in enumerate(strict_json.read_text(path).split("\n"), 1):
        if not line:
            continue
        raw = strict_json.parse(line, f"{path} line {number}")
        target, text = (raw.get("target"), raw.get("text")) if isinstance(raw, dict) else (0, 0)
        if not isinstance(target, str) or not isinstance(text, str):
            raise ValueError(
                f"{path} line {number} has no 'target' and 'text' that are strings: "
                f"write the predictions again"
            )
        counts[sys.intern(target), sys.intern(text)] += 1
    return counts


def compute_class_metrics(
    matrix: AccuracyMatrix, confusions: Confusions, after: int | None = None
) -> list[ClassMetrics]:
    """Compute the accuracy, the forgetting and the confusions of every class seen.

    Forgetting is that of Chaudhry et al. 2018, arXiv:1801.10112, as for tasks
    (``continual_metrics.forgetting``), on the test samples of one class. It is undefined for a
    class after whose first task none was learned.

    Args:
        matrix: of the run; gives the tasks and their order.
        confusions: of its cells; a cell that is missing leaves what needs it undefined.
        after: number of learned tasks T, None for the last row measured.

    Returns:
        one entry per class, by first task and name; none if no classification task is learned.
        Classes that are only predicted come last.

    Raises:
        ValueError: if the stream has fewer tasks.
    """
    counts = _ClassCounts(matrix, confusions, row_of(matrix, after))
    order = {name: n for n, name in enumerate(counts.tasks_of)}
    wrong: dict[str, list[tuple[str, int]]] = {name: [] for name in order}
    for (target, text), samples in counts.final.items():
        if text != target:
            wrong[target].append((text, samples))
    return [
        _metrics_of(counts, name, sorted(wrong[name], key=lambda pair: (-pair[1], order[pair[0]])))
        for name in order
    ]


def confusion_matrix(
    matrix: AccuracyMatrix, confusions: Confusions, after: int | None = None
) -> ConfusionMatrix:
    """Count the confusion matrix after T tasks, over all classes seen.

    Args:
        matrix: of the run; gives the tasks and their order.
        confusions: of its cells.
        after: number of learned tasks T, None for the last row measured.

    Raises:
        Undefined: if no classification task is learned, or predictions of one are missing or
            empty.
        ValueError: if the stream has fewer tasks.
    """
    counts = _ClassCounts(matrix, confusions, row_of(matrix, after))
    if not counts.tasks:
        raise Undefined("no classification task is learned yet")
    for task in counts.tasks:
        counts.check(counts.last, task)
    if not counts.tasks_of:
        raise Undefined("there is no test sample")
    index = {name: n for n, name in enumerate(counts.tasks_of)}
    return ConfusionMatrix(
        tuple(index),
        tuple(matrix.names[own[0] - 1] if own else "" for own in counts.tasks_of.values()),
        {(index[target], index[text]): n for (target, text), n in counts.final.items()},
    )


class _ClassCounts:
    """Test samples of every class and right predictions of them, up to row ``last``.

    Attributes:
        tasks: classification tasks learned, numbered from 1.
        tasks_of: class -> tasks that have test samples of it, by first task and name.
        cells: (row, task) -> class -> test samples, right predictions.
        final: (target, predicted class) -> test samples of the last row.
    """

    def __init__(self, matrix: AccuracyMatrix, confusions: Confusions, last: int) -> None:
        self.matrix, self.last = matrix, last
        # A repeated task has the test samples of the first.
        learned = [(n, c) for n, c in enumerate(matrix.columns[:last], 1) if not c.repeat_of]
        self.tasks = [task for task, column in learned if column.task_type == "classification"]
        self.cells: dict[Cell, dict[str, tuple[int, int]]] = {}
        self.final: Counter[tuple[str, str]] = Counter()
        classes: dict[str, dict[int, None]] = {}
        for task in self.tasks:
            for row in range(last + 1):
                pairs = confusions.get((row, task - 1))
                if pairs is None:
                    continue
                own = self.cells.setdefault((row, task), {})
                for (target, text), samples in pairs.items():
                    seen, right = own.get(target, (0, 0))
                    own[target] = (seen + samples, right + samples * (text == target))
                    classes.setdefault(target, {})[task] = None
            self.final.update(confusions.get((last, task - 1), {}))
        for _, text in self.final:
            classes.setdefault(text, {})
        tasks_of = {name: tuple(tasks) for name, tasks in classes.items()}
        # Predictions name classes without their number on the card, so names give the order.
        self.tasks_of = dict(sorted(tasks_of.items(), key=_by_first_task))

    def check(self, row: int, task: int) -> None:
        """Raise Undefined if a cell has no predictions."""
        if (row, task) not in self.cells:
            title = self.matrix.names[task - 1]
            raise Undefined(f"no predictions of {title!r} in row {row} ({self.title(row)})")

    def title(self, row: int) -> str:
        """Name of a row, also of one that the matrix does not have yet."""
        return self.matrix.rows[row] if row < len(self.matrix.rows) else "not measured yet"

    def accuracy(self, name: str, cells: Iterable[Cell]) -> float:
        """Accuracy of a class over the samples of (row, task) cells; may be Undefined."""
        seen = right = 0
        for cell in cells:
            self.check(*cell)
            of_class = self.cells[cell].get(name, (0, 0))
            seen, right = seen + of_class[0], right + of_class[1]
        if not seen:
            raise Undefined(_NO_SAMPLE)
        return right / seen

    def forgetting(self, name: str) -> float:
        """Mean forgetting of a class over its earlier tasks; may be Undefined."""
        if not self.tasks_of[name]:
            raise Undefined(_NO_SAMPLE)
        earlier = [task for task in self.tasks_of[name] if task < self.last]
        if not earlier:
            raise Undefined("no task was learned after the class")
        return fmean([self._forgotten(name, task) for task in earlier])

    def _forgotten(self, name: str, task: int) -> float:
        scores = [self.accuracy(name, [(row, task)]) for row in range(task, self.last + 1)]
        return max(scores[:-1]) - scores[-1]

    def samples(self, name: str) -> int:
        """Test samples of a class, each task counted once."""
        counts = [
            next(own[name][0] for (_, of), own in self.cells.items() if of == task and name in own)
            for task in self.tasks_of[name]
        ]
        return sum(counts)


def _by_first_task(of_class: tuple[str, tuple[int, ...]]) -> tuple[bool, tuple[int, ...], str]:
    """Sort key of a class and its tasks: first task, classes of no task last, then name."""
    name, tasks = of_class
    return not tasks, tasks[:1], name


def _metrics_of(counts: _ClassCounts, name: str, wrong: Sequence[tuple[str, int]]) -> ClassMetrics:
    tasks, accuracy = counts.tasks_of[name], partial(counts.accuracy, name)
    by_row = [
        (f"accuracy after {counts.title(row)}", partial(accuracy, [(row, i) for i in tasks]))
        for row in range(counts.last + 1)
    ]
    return ClassMetrics(
        name,
        tuple(counts.matrix.names[task - 1] for task in tasks),
        counts.samples(name),
        tuple(_value(title, _ACCURACY, compute) for title, compute in by_row),
        _value("accuracy after learning", _LEARNING, partial(accuracy, [(i, i) for i in tasks])),
        _value("forgetting", _FORGETTING, partial(counts.forgetting, name)),
        tuple(wrong),
    )


def _value(name: str, definition: str, compute: Callable[[], float]) -> MetricValue:
    try:
        return MetricValue(name, compute(), definition)
    except Undefined as gap:
        return MetricValue(name, None, definition, str(gap))
