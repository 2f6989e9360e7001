"""Zero-shot metrics: transfer to tasks not learned yet, and retention of eval-only tasks.

In every docstring a[t][i] is the score of task i after task t (row 0 is before training), T is the
number of tasks learned so far: a metric after fewer tasks treats the stream as if it ended there.
A metric is undefined, with the reason, where a cell that it needs was not measured.
"""

from __future__ import annotations

from statistics import fmean

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


def zero_shot_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean zero-shot score, before training, of the tasks learned since."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, [(0, task) for task in range(1, last + 1)]))

    return compute_metric("zero-shot accuracy", "1/T sum over i <= T of a[0][i]", compute)


def forward_transfer(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean gain of a task over its zero-shot score just before it is learned, FWT.

    The baseline is the zero-shot row and not chance, because a pretrained model has zero-shot
    skill; for such models forward transfer is usually negative.
    """
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 2)
        return fmean([score(matrix, i - 1, i) - score(matrix, 0, i) for i in range(2, last + 1)])

    definition = "1/(T-1) sum over i = 2..T of (a[i-1][i] - a[0][i]), baseline zero-shot"
    return compute_metric("forward transfer", definition, compute)


def mtil_transfer(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean score of tasks not learned yet, "Transfer" of ZSCL (arXiv:2303.06628)."""
    last = row_of(matrix, after)
    definition = "1/(T-1) sum over i = 2..T of (1/(i-1) sum over t = 1..i-1 of a[t][i])"
    return compute_metric("Transfer (MTIL)", definition, lambda: _transfer(matrix, last))


def mtil_average(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean over all tasks and all rows after training, learned or not: "Avg" of ZSCL."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, _square(last)))

    return compute_metric("Avg (MTIL)", "1/T^2 sum over t = 1..T and i of a[t][i]", compute)


def mtil_last(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean over all tasks of the last row: "Last" of ZSCL."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, [(last, task) for task in range(1, last + 1)]))

    return compute_metric("Last (MTIL)", "1/T sum over i of a[T][i]", compute)


def zero_shot_degradation(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean drop of the tasks not learned yet below zero-shot, ZSD; positive is worse."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 2)
        before = fmean(scores(matrix, [(0, task) for task in range(2, last + 1)]))
        return before - _transfer(matrix, last)

    definition = "1/(T-1) sum over i = 2..T of (a[0][i] - 1/(i-1) sum over t = 1..i-1 of a[t][i])"
    return compute_metric("zero-shot degradation", definition, compute)


def in_domain(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean score on the period just learned, TiC (arXiv:2310.16226)."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        return fmean(scores(matrix, [(task, task) for task in range(1, last + 1)]))

    return compute_metric("in-domain (TiC)", "mean of a[t][i] with i = t", compute)


def backward_in_time(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean score on periods older than the one just learned, TiC."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 2)
        return fmean(scores(matrix, [(row, task) for row, task in _square(last) if task < row]))

    return compute_metric("backward (TiC)", "mean of a[t][i] with 1 <= i < t <= T", compute)


def forward_in_time(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean score on periods newer than the one just learned, TiC."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 2)
        return fmean(scores(matrix, [(row, task) for row, task in _square(last) if task > row]))

    return compute_metric("forward (TiC)", "mean of a[t][i] with 1 <= t < i <= T", compute)


def unseen_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Mean score of the tasks of the stream that are not learned yet."""
    last = row_of(matrix, after)
    definition = "mean of a[T][i] over the tasks i > T of the stream"
    return compute_metric("unseen accuracy", definition, lambda: _unseen(matrix, last))


def harmonic_mean(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Harmonic mean of seen (average) accuracy and unseen accuracy, 0 if either is 0."""
    last = row_of(matrix, after)

    def compute() -> float:
        require_tasks(last, 1)
        seen = fmean(scores(matrix, [(last, task) for task in range(1, last + 1)]))
        unseen = _unseen(matrix, last)
        return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0

    return compute_metric("harmonic mean", "2 seen unseen / (seen + unseen) after task T", compute)


def eval_only_retention(matrix: AccuracyMatrix, after: int | None = None) -> list[MetricValue]:
    """Retention of each eval-only task: ratio to, then difference from, its zero-shot score.

    The mean difference comes last; a matrix without eval-only tasks has none of these.
    """
    last = row_of(matrix, after)
    metrics = []
    columns = range(matrix.tasks + 1, len(matrix.columns) + 1)
    for column in columns:
        name = matrix.names[column - 1]

        def ratio(column: int = column) -> float:
            before = score(matrix, 0, column)
            if before == 0:
                raise Undefined(f"{matrix.names[column - 1]!r} scored 0 before training")
            return score(matrix, last, column) / before

        def change(column: int = column) -> float:
            return score(matrix, last, column) - score(matrix, 0, column)

        metrics.append(
            compute_metric(f"retention of {name}", "x[T] / x[0] of the eval-only task", ratio)
        )
        metrics.append(
            compute_metric(f"change of {name}", "x[T] - x[0] of the eval-only task", change)
        )

    def mean_change() -> float:
        return fmean([score(matrix, last, column) - score(matrix, 0, column) for column in columns])

    if metrics:
        definition = "mean over the eval-only tasks of x[T] - x[0]"
        metrics.append(compute_metric("mean change of eval-only tasks", definition, mean_change))
    return metrics


def _transfer(matrix: AccuracyMatrix, last: int) -> float:
    require_tasks(last, 2)
    return fmean([fmean(scores(matrix, [(t, i) for t in range(1, i)])) for i in range(2, last + 1)])


def _unseen(matrix: AccuracyMatrix, last: int) -> float:
    if last == matrix.tasks:
        raise Undefined("every task of the stream was learned")
    return fmean(scores(matrix, [(last, task) for task in range(last + 1, matrix.tasks + 1)]))


def _square(last: int) -> list[tuple[int, int]]:
    return [(row, task) for row in range(1, last + 1) for task in range(1, last + 1)]
