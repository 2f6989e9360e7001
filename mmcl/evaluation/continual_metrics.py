"""Continual-learning metrics: average accuracy, forgetting, backward transfer, plasticity.

In every docstring a[t][i] is the score of task i after task t (row 0 is before training), T is the
number of tasks learned so far. A metric is undefined, with the reason, where a cell that it needs
was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Literal

from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.metric import (
    MetricValue,
    Undefined,
    compute_metric,
    require_tasks,
    row_of,
    score,
    scores,
)

Divisor = Literal["t-1", "t"]


def average_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Average accuracy over the tasks learned so far: OP_T, MFN, "Last".

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.
    """
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, [(last, task) for task in range(1, last + 1)]))

    return compute_metric("average accuracy", "1/T sum over i <= T of a[T][i]", compute)


def pooled_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Accuracy over the pooled test samples of the tasks learned so far, A_T of class-IL papers."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        sizes = [column.size for column in matrix.columns[:last]]
        if min(sizes) == 0:
            raise Undefined(
                f"number of test samples of {matrix.names[sizes.index(0)]!r} is not known"
            )
        row = scores(matrix, [(last, task) for task in range(1, last + 1)])
        hits = math.fsum(value * size for value, size in zip(row, sizes, strict=True))
        return hits / sum(sizes)

    definition = "sum over i <= T of n[i] a[T][i] / sum of n[i], n = number of test samples"
    return compute_metric("pooled accuracy", definition, compute)


def mean_average_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean over training of the average accuracy: MAA, "average incremental accuracy"."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        triangle = [[(row, task) for task in range(1, row + 1)] for row in range(1, last + 1)]
        return fmean([fmean(scores(matrix, cells)) for cells in triangle])

    return compute_metric(
        "mean average accuracy", "1/T sum over t of (1/t sum over i <= t of a[t][i])", compute
    )


def learning_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean accuracy of each task when it was just learned, MFT: plasticity."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, [(task, task) for task in range(1, last + 1)]))

    return compute_metric("learning accuracy", "1/T sum over i of a[i][i]", compute)


def forgetting_of(
    matrix: AccuracyMatrix, task: int, after: int | None = None, *, from_zero: bool = False
) -> MetricValue:
    """Forgetting of one task: its best earlier score minus its score now, negative if it improved.

    Args:
        matrix: the scores.
        task: which task, from 1.
        after: number of learned tasks, None for the last row measured.
        from_zero: count the zero-shot row as an earlier score too.
    """
    last = row_of(matrix, after)

    def compute() -> float:
        if not 1 <= task < last:
            raise Undefined(f"no task was learned after task {task}")
        first = 0 if from_zero else task
        best = max(scores(matrix, [(row, task) for row in range(first, last)]))
        return best - score(matrix, last, task)

    start = "0" if from_zero else "i"
    name = f"forgetting of {matrix.names[task - 1]}"
    return compute_metric(
        name, f"max over l in {start}..T-1 of a[l][i] - a[T][i], i = {task}", compute
    )


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
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 2)
        parts = [forgetting_of(matrix, task, last, from_zero=from_zero) for task in range(1, last)]
        return fmean([_value(part) for part in parts])

    start = "0" if from_zero else "i"
    definition = (
        f"1/(T-1) sum over i < T of (max over l in {start}..T-1 of a[l][i] - a[T][i]), not clamped"
    )
    name = "forgetting (from zero-shot)" if from_zero else "forgetting"
    return compute_metric(name, definition, compute)


def backward_transfer(
    matrix: AccuracyMatrix, after: int | None = None, *, divisor: Divisor = "t-1"
) -> MetricValue:
    """Mean change of the earlier tasks since each was learned, BWT; negative means forgetting.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.
        divisor: "t-1" counts the earlier tasks; "t" counts the last one too, whose change is 0,
            which makes the metric average accuracy minus learning accuracy.
    """
    last = row_of(matrix, after)
    if divisor not in ("t-1", "t"):
        raise ValueError(f"divisor is {divisor!r}: choose 't-1' or 't'")

    def compute() -> float:
        require_tasks(last, 2)
        changes = [score(matrix, last, i) - score(matrix, i, i) for i in range(1, last)]
        return math.fsum(changes) / (last if divisor == "t" else last - 1)

    name = "backward transfer" if divisor == "t-1" else "backward transfer (divisor T)"
    count = "1/(T-1)" if divisor == "t-1" else "1/T"
    return compute_metric(name, f"{count} sum over i < T of (a[T][i] - a[i][i])", compute)


def plasticity_gap(
    matrix: AccuracyMatrix, reference: list[float], after: int | None = None
) -> MetricValue:
    """Gap of learning accuracy to a reference learner, "intransigence"; positive is worse.

    Args:
        matrix: the scores.
        reference: per task, its score when trained alone or jointly.
        after: number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if there are fewer references than learned tasks.
    """
    last = row_of(matrix, after)
    if len(reference) < last:
        raise ValueError(f"reference has {len(reference)} scores for {last} tasks: give one each")

    def compute() -> float:
        require_tasks(last, 1)
        return fmean([reference[i - 1] - score(matrix, i, i) for i in range(1, last + 1)])

    return compute_metric("plasticity gap", "1/T sum over i of (reference[i] - a[i][i])", compute)


def over_training(
    figure: Callable[[AccuracyMatrix, int], MetricValue], matrix: AccuracyMatrix, first: int = 1
) -> list[MetricValue]:
    """Compute a metric after every task from ``first`` to the last row measured."""
    return [figure(matrix, row) for row in range(first, (matrix.last_row or 0) + 1)]


def _value(figure: MetricValue) -> float:
    if figure.value is None:
        raise Undefined(figure.reason or "undefined")
    return figure.value
