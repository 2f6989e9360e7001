"""Continual-learning metrics of an accuracy matrix: each a number, or the reason why it has none.

In every docstring a[t][i] is the score of task i after task t (row 0 is before training), T is the
number of tasks learned so far: a metric after fewer tasks treats the stream as if it ended there.
A metric is undefined, with the reason, where a cell that it needs was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

from mmcl.evaluation.matrix import AccuracyMatrix, Cell

MAIN = (
    "average accuracy", "mean average accuracy", "learning accuracy", "forgetting",
    "backward transfer", "forward transfer",
)  # fmt: skip
LENIENT_MAIN = "lenient average accuracy"


@dataclass(frozen=True)
class MetricValue:
    """Metric of a run: a value with its definition, or the reason why there is none.

    Args:
        name: of the metric.
        value: the number, None if it is undefined.
        definition: how it is computed; ``a[t][i]`` is the score of task i after task t, t = 0
            before training.
        reason: why there is no value, None if there is one.
    """

    name: str
    value: float | None
    definition: str
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.reason is not None):
            raise ValueError(
                f"{self.name!r} has value {self.value!r} and reason {self.reason!r}: "
                f"give a value or the reason why there is none"
            )


class Undefined(Exception):
    """Raised inside the computation of a metric that has no value; the text is the reason."""


@dataclass(frozen=True)
class Metric:
    """Continual-learning metric of an accuracy matrix.

    Args:
        name: of the metric.
        definition: how it is computed.
        compute: from a matrix and T to the value; raises ``Undefined`` where there is none.
        least: tasks that must be learned, 0 to 2.
    """

    name: str
    definition: str
    compute: Callable[[AccuracyMatrix, int], float]
    least: int = 1

    def __call__(self, matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
        """Compute the metric after a number of learned tasks, None for the last row measured.

        Raises:
            ValueError: if the stream has fewer tasks.
        """
        last = row_of(matrix, after)
        try:
            if last < self.least:
                one = self.least == 1
                raise Undefined("no task is learned yet" if one else "needs two learned tasks")
            return MetricValue(self.name, self.compute(matrix, last), self.definition)
        except Undefined as gap:
            return MetricValue(self.name, None, self.definition, str(gap))


def row_of(matrix: AccuracyMatrix, after: int | None) -> int:
    """Return the matrix row after a number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if the stream has fewer tasks.
    """
    if after is None:
        return matrix.last_row or 0
    if not 0 <= after <= matrix.tasks:
        raise ValueError(f"after is {after}: give 0 (before training) to {matrix.tasks} tasks")
    return after


def score(matrix: AccuracyMatrix, row: int, task: int) -> float:
    """Return the score a[row][task], tasks counted from 1.

    Raises:
        Undefined: if it was not measured.
    """
    if row >= len(matrix.rows):
        raise Undefined(
            f"row {row} is not measured yet: only {len(matrix.rows) - 1} tasks are learned"
        )
    value = matrix.get(row, task - 1)
    if value is None:
        raise Undefined(
            f"not measured: {matrix.names[task - 1]!r} in row {row} ({matrix.rows[row]})"
        )
    return value


def expect_new_tasks(matrix: AccuracyMatrix) -> None:
    """Check that no task of the stream is repeated, for metrics of tasks before they are learned.

    Raises:
        Undefined: naming the first repeated task.
    """
    for column in matrix.columns:
        if column.repeat_of:
            raise Undefined(f"{column.name!r} was learned before, as {column.repeat_of!r}")


def mean_score(matrix: AccuracyMatrix, cells: Iterable[Cell]) -> float:
    """Return the mean of a[row][task] over cells; Undefined if one was not measured."""
    return fmean([score(matrix, row, task) for row, task in cells])


def _row(row: int, last: int) -> list[Cell]:
    return [(row, task) for task in range(1, last + 1)]


def _diagonal(last: int) -> list[Cell]:
    return [(task, task) for task in range(1, last + 1)]


def _square(last: int) -> list[Cell]:
    return [cell for row in range(1, last + 1) for cell in _row(row, last)]


@partial(Metric, "average accuracy", "1/T sum over i <= T of a[T][i]")
def average_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Average accuracy over the tasks learned so far: OP_T, MFN, "Last"."""
    return mean_score(matrix, _row(last, last))


@partial(
    Metric,
    "pooled accuracy",
    "sum over i <= T of n[i] a[T][i] / sum of n[i], n = number of test samples",
)
def pooled_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Accuracy over the pooled test samples of the tasks learned so far, A_T of class-IL papers."""
    sizes = [column.size for column in matrix.columns[:last]]
    if min(sizes) == 0:
        raise Undefined(f"number of test samples of {matrix.names[sizes.index(0)]!r} is not known")
    hits = [score(matrix, last, task) * size for task, size in enumerate(sizes, 1)]
    return math.fsum(hits) / sum(sizes)


@partial(Metric, "mean average accuracy", "1/T sum over t of (1/t sum over i <= t of a[t][i])")
def mean_average_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Mean over training of the average accuracy: MAA, "average incremental accuracy"."""
    return fmean([mean_score(matrix, _row(row, row)) for row in range(1, last + 1)])


@partial(Metric, "learning accuracy", "1/T sum over i of a[i][i]")
def learning_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Mean accuracy of each task when it was just learned, MFT: plasticity."""
    return mean_score(matrix, _diagonal(last))


def forgetting_of(matrix: AccuracyMatrix, task: int, after: int | None = None) -> MetricValue:
    """Forgetting of one task: its best earlier score minus its score now, negative if it improved.

    Args:
        matrix: the scores.
        task: which task, from 1.
        after: number of learned tasks, None for the last row measured.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        if not 1 <= task < last:
            raise Undefined(f"no task was learned after task {task}")
        return _forgotten(matrix, task, task, last)

    definition = f"max over l in i..T-1 of a[l][i] - a[T][i], i = {task}"
    name = f"forgetting of {matrix.names[task - 1]}"
    return Metric(name, definition, compute, least=0)(matrix, after)


def forgetting(
    matrix: AccuracyMatrix, after: int | None = None, *, from_zero: bool = False
) -> MetricValue:
    """Mean forgetting of the earlier tasks, never clamped: negative means backward improvement.

    Chaudhry et al. 2018, arXiv:1801.10112. The best score is taken from the task's own row on,
    without the last row.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.
        from_zero: count the zero-shot row as an earlier score too, so that zero-shot skill lost
            before the task was trained counts as forgetting.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        tasks = range(1, last)
        return fmean([_forgotten(matrix, i, 0 if from_zero else i, last) for i in tasks])

    name, start = ("forgetting (from zero-shot)", "0") if from_zero else ("forgetting", "i")
    definition = (
        f"1/(T-1) sum over i < T of (max over l in {start}..T-1 of a[l][i] - a[T][i]), not clamped"
    )
    return Metric(name, definition, compute, least=2)(matrix, after)


def _forgotten(matrix: AccuracyMatrix, task: int, first: int, last: int) -> float:
    best = max([score(matrix, row, task) for row in range(first, last)])
    return best - score(matrix, last, task)


def backward_transfer(
    matrix: AccuracyMatrix, after: int | None = None, *, divisor: Literal["t-1", "t"] = "t-1"
) -> MetricValue:
    """Mean change of the earlier tasks since each was learned, BWT; negative means forgetting.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.
        divisor: "t-1" counts the earlier tasks; "t" counts the last one too, whose change is 0,
            which makes the metric average accuracy minus learning accuracy.
    """
    if divisor not in ("t-1", "t"):
        raise ValueError(f"divisor is {divisor!r}: choose 't-1' or 't'")

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        changes = [score(matrix, last, i) - score(matrix, i, i) for i in range(1, last)]
        return math.fsum(changes) / (last if divisor == "t" else last - 1)

    name = "backward transfer" if divisor == "t-1" else "backward transfer (divisor T)"
    definition = f"1/{'T' if divisor == 't' else '(T-1)'} sum over i < T of (a[T][i] - a[i][i])"
    return Metric(name, definition, compute, least=2)(matrix, after)


@partial(
    Metric,
    "forward transfer",
    "1/(T-1) sum over i = 2..T of (a[i-1][i] - a[0][i]), baseline zero-shot",
    least=2,
)
def forward_transfer(matrix: AccuracyMatrix, last: int) -> float:
    """Mean gain of a task over its zero-shot score just before it is learned, FWT.

    The baseline is the zero-shot row and not chance, because a pretrained model has zero-shot
    skill; for such models forward transfer is usually negative.
    """
    expect_new_tasks(matrix)
    return fmean([score(matrix, i - 1, i) - score(matrix, 0, i) for i in range(2, last + 1)])


@partial(Metric, "zero-shot accuracy", "1/T sum over i <= T of a[0][i]")
def zero_shot_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Mean zero-shot score, before training, of the tasks learned since."""
    return mean_score(matrix, _row(0, last))


@partial(
    Metric,
    "zero-shot degradation",
    "1/(T-1) sum over i = 2..T of (a[0][i] - 1/(i-1) sum over t = 1..i-1 of a[t][i])",
    least=2,
)
def zero_shot_degradation(matrix: AccuracyMatrix, last: int) -> float:
    """Mean drop of the tasks not learned yet below zero-shot, ZSD; positive is worse."""
    expect_new_tasks(matrix)
    return mean_score(matrix, _row(0, last)[1:]) - mtil_transfer.compute(matrix, last)


@partial(
    Metric,
    "Transfer (MTIL)",
    "1/(T-1) sum over i = 2..T of (1/(i-1) sum over t = 1..i-1 of a[t][i])",
    least=2,
)
def mtil_transfer(matrix: AccuracyMatrix, last: int) -> float:
    """Mean score of tasks not learned yet, "Transfer" of ZSCL (arXiv:2303.06628)."""
    expect_new_tasks(matrix)
    return fmean([mean_score(matrix, [(t, i) for t in range(1, i)]) for i in range(2, last + 1)])


@partial(Metric, "Avg (MTIL)", "1/T^2 sum over t = 1..T and i of a[t][i]")
def mtil_average(matrix: AccuracyMatrix, last: int) -> float:
    """Mean over all tasks and all rows after training, learned or not: "Avg" of ZSCL."""
    return mean_score(matrix, _square(last))


@partial(Metric, "Last (MTIL)", "1/T sum over i of a[T][i]")
def mtil_last(matrix: AccuracyMatrix, last: int) -> float:
    """Mean over all tasks of the last row: "Last" of ZSCL."""
    return mean_score(matrix, _row(last, last))


@partial(Metric, "in-domain (TiC)", "mean of a[t][i] with i = t")
def in_domain(matrix: AccuracyMatrix, last: int) -> float:
    """Mean score on the period just learned, TiC (arXiv:2310.16226)."""
    return mean_score(matrix, _diagonal(last))


@partial(Metric, "backward (TiC)", "mean of a[t][i] with 1 <= i < t <= T", least=2)
def backward_in_time(matrix: AccuracyMatrix, last: int) -> float:
    """Mean score on periods older than the one just learned, TiC."""
    return mean_score(matrix, [(row, task) for row, task in _square(last) if task < row])


@partial(Metric, "forward (TiC)", "mean of a[t][i] with 1 <= t < i <= T", least=2)
def forward_in_time(matrix: AccuracyMatrix, last: int) -> float:
    """Mean score on periods newer than the one just learned, TiC."""
    expect_new_tasks(matrix)
    return mean_score(matrix, [(row, task) for row, task in _square(last) if task > row])


@partial(Metric, "unseen accuracy", "mean of a[T][i] over the tasks i > T of the stream", least=0)
def unseen_accuracy(matrix: AccuracyMatrix, last: int) -> float:
    """Mean score of the tasks of the stream that are not learned yet."""
    expect_new_tasks(matrix)
    if last == matrix.tasks:
        raise Undefined("every task of the stream was learned")
    return mean_score(matrix, _row(last, matrix.tasks)[last:])


@partial(Metric, "harmonic mean", "2 seen unseen / (seen + unseen) after task T")
def harmonic_mean(matrix: AccuracyMatrix, last: int) -> float:
    """Harmonic mean of seen (average) accuracy and unseen accuracy, 0 if either is 0."""
    seen = average_accuracy.compute(matrix, last)
    unseen = unseen_accuracy.compute(matrix, last)
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


def eval_only_retention(matrix: AccuracyMatrix, after: int | None = None) -> list[MetricValue]:
    """Retention of each eval-only task: ratio to, then difference from, its zero-shot score.

    The mean difference comes last; a matrix without eval-only tasks has none of these.
    """

    def ratio(column: int, matrix: AccuracyMatrix, last: int) -> float:
        before = score(matrix, 0, column)
        if before == 0:
            raise Undefined(f"{matrix.names[column - 1]!r} scored 0 before training")
        return score(matrix, last, column) / before

    def change(columns: Iterable[int], matrix: AccuracyMatrix, last: int) -> float:
        return fmean([score(matrix, last, column) - score(matrix, 0, column) for column in columns])

    of_one, metrics = "of the eval-only task", []
    columns = range(matrix.tasks + 1, len(matrix.columns) + 1)
    for column in columns:
        name = matrix.names[column - 1]
        metrics += [
            Metric(f"retention of {name}", f"x[T] / x[0] {of_one}", partial(ratio, column), 0),
            Metric(f"change of {name}", f"x[T] - x[0] {of_one}", partial(change, [column]), 0),
        ]
    if metrics:
        name, definition = (
            "mean change of eval-only tasks",
            "mean over the eval-only tasks of x[T] - x[0]",
        )
        metrics.append(Metric(name, definition, partial(change, columns), 0))
    return [metric(matrix, after) for metric in metrics]


def compute_all_metrics(matrix: AccuracyMatrix, after: int | None = None) -> list[MetricValue]:
    """Compute all metrics of a matrix, in the order of the report; undefined ones hold the reason.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    metrics = (
        average_accuracy, pooled_accuracy, mean_average_accuracy, learning_accuracy, forgetting,
        partial(forgetting, from_zero=True), backward_transfer,
        partial(backward_transfer, divisor="t"), forward_transfer, zero_shot_accuracy,
        zero_shot_degradation, mtil_transfer, mtil_average, mtil_last, in_domain, backward_in_time,
        forward_in_time, unseen_accuracy, harmonic_mean,
    )  # fmt: skip
    return [metric(matrix, after) for metric in metrics] + eval_only_retention(matrix, after)


def either_form(strict: AccuracyMatrix, lenient: AccuracyMatrix) -> AccuracyMatrix:
    """Make the matrix of lenient scores, with the strict ones where no answers are generated."""
    either = strict.empty_copy()
    for row in range(len(strict.rows)):
        for index, column in enumerate(strict.columns):
            source = lenient if column.task_type == "instruction" else strict
            either.set(row, index, source.get(row, index))
    return either


def compute_lenient_metrics(
    strict: AccuracyMatrix, lenient: AccuracyMatrix, after: int | None = None
) -> list[MetricValue]:
    """Compute the lenient average accuracy, lenient forgetting and the format gap.

    A model may forget how to answer (in one word, by a letter) and still know the answer. Generated
    answers are scored strictly and leniently; the gap is the form alone. A column without generated
    answers has one score, which counts as both.

    Args:
        strict: the scores.
        lenient: of the same shape, scores in any form.
        after: number of learned tasks, None for the last row of ``strict`` that is measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    last = row_of(strict, after)
    either = either_form(strict, lenient)

    def gap(matrix: AccuracyMatrix, last: int) -> float:
        cells = _row(last, last)
        return fmean([score(either, *cell) - score(matrix, *cell) for cell in cells])

    known, lost = average_accuracy(either, last), forgetting(either, last)
    note = "l = score in any form"
    average = f"1/T sum over i of l[T][i], {note}"
    highest = f"1/(T-1) sum over i < T of (max over t in i..T-1 of l[t][i] - l[T][i]), {note}"
    format_gap = Metric("format gap", f"1/T sum over i of (l[T][i] - a[T][i]), {note}", gap)
    return [
        MetricValue(LENIENT_MAIN, known.value, average, known.reason),
        MetricValue("lenient forgetting", lost.value, highest, lost.reason),
        format_gap(strict, last),
    ]
