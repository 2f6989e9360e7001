"""Figures of tasks not yet learned and of probes: zero-shot ability before, during and after.

In every docstring a[t][i] is the score of task i after task t (row 0 is before training), T is the
number of tasks learned so far: a figure asked for after fewer tasks treats the stream as if it
ended there. A cell that was not measured leaves the figure without a value, with the reason.
"""

from __future__ import annotations

from mmcl.metrics.figure import Figure, Undefined, define, mean, need, row_of, score, scores
from mmcl.metrics.matrix import AccuracyMatrix


def zero_shot_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score before training of the tasks learned since."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 1)
        return mean(scores(matrix, [(0, task) for task in range(1, last + 1)]))

    return define("zero-shot accuracy", "1/T sum over i <= T of a[0][i]", compute)


def forward_transfer(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean gain of a task over zero-shot just before it is learned, FWT.

    The baseline is the zero-shot row and not chance, as fits a model that can do something before
    it is trained; for such models the figure is usually negative.
    """
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 2)
        return mean([score(matrix, i - 1, i) - score(matrix, 0, i) for i in range(2, last + 1)])

    definition = "1/(T-1) sum over i = 2..T of (a[i-1][i] - a[0][i]), baseline zero-shot"
    return define("forward transfer", definition, compute)


def mtil_transfer(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score of tasks while they are not yet learned, "Transfer" of ZSCL (arXiv:2303.06628)."""
    last = row_of(matrix, after)
    definition = "1/(T-1) sum over i = 2..T of (1/(i-1) sum over t = 1..i-1 of a[t][i])"
    return define("Transfer (MTIL)", definition, lambda: _transfer(matrix, last))


def mtil_average(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean over all tasks and all rows after training, learned or not: "Avg" of ZSCL."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 1)
        return mean(scores(matrix, _square(last)))

    return define("Avg (MTIL)", "1/T^2 sum over t = 1..T and i of a[t][i]", compute)


def mtil_last(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean over all tasks of the last row: "Last" of ZSCL."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 1)
        return mean(scores(matrix, [(last, task) for task in range(1, last + 1)]))

    return define("Last (MTIL)", "1/T sum over i of a[T][i]", compute)


def zero_shot_degradation(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean loss of the tasks not yet learned against zero-shot, ZSD; positive is worse."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 2)
        before = mean(scores(matrix, [(0, task) for task in range(2, last + 1)]))
        return before - _transfer(matrix, last)

    definition = "1/(T-1) sum over i = 2..T of (a[0][i] - 1/(i-1) sum over t = 1..i-1 of a[t][i])"
    return define("zero-shot degradation", definition, compute)


def in_domain(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score on the period just learned, TiC (arXiv:2310.16226)."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 1)
        return mean(scores(matrix, [(task, task) for task in range(1, last + 1)]))

    return define("in-domain (TiC)", "mean of a[t][i] with i = t", compute)


def backward_in_time(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score on periods older than the one just learned, TiC."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 2)
        return mean(scores(matrix, [(row, task) for row, task in _square(last) if task < row]))

    return define("backward (TiC)", "mean of a[t][i] with 1 <= i < t <= T", compute)


def forward_in_time(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score on periods newer than the one just learned, TiC."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 2)
        return mean(scores(matrix, [(row, task) for row, task in _square(last) if task > row]))

    return define("forward (TiC)", "mean of a[t][i] with 1 <= t < i <= T", compute)


def unseen_accuracy(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Mean score of the tasks of the stream that are still to come."""
    last = row_of(matrix, after)
    definition = "mean of a[T][i] over the tasks i > T of the stream"
    return define("unseen accuracy", definition, lambda: _unseen(matrix, last))


def harmonic_mean(matrix: AccuracyMatrix, after: int | None = None) -> Figure:
    """Harmonic mean of seen (average) accuracy and unseen accuracy, 0 if either is 0."""
    last = row_of(matrix, after)

    def compute() -> float:
        need(last, 1)
        seen = mean(scores(matrix, [(last, task) for task in range(1, last + 1)]))
        unseen = _unseen(matrix, last)
        return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0

    return define("harmonic mean", "2 seen unseen / (seen + unseen) after task T", compute)


def probe_retention(matrix: AccuracyMatrix, after: int | None = None) -> list[Figure]:
    """For every probe the ratio to, then the difference from, its score before training.

    The mean difference over the probes is the last figure; no probes, no figures.
    """
    last = row_of(matrix, after)
    figures = []
    places = range(matrix.tasks + 1, len(matrix.columns) + 1)
    for place in places:
        name = matrix.names[place - 1]

        def ratio(place: int = place) -> float:
            before = score(matrix, 0, place)
            if before == 0:
                raise Undefined(f"{matrix.names[place - 1]!r} scored 0 before training")
            return score(matrix, last, place) / before

        def change(place: int = place) -> float:
            return score(matrix, last, place) - score(matrix, 0, place)

        figures.append(define(f"retention of {name}", "x[T] / x[0] of the probe", ratio))
        figures.append(define(f"change of {name}", "x[T] - x[0] of the probe", change))

    def mean_change() -> float:
        return mean([score(matrix, last, place) - score(matrix, 0, place) for place in places])

    if figures:
        definition = "mean over the probes of x[T] - x[0]"
        figures.append(define("mean change of probes", definition, mean_change))
    return figures


def _transfer(matrix: AccuracyMatrix, last: int) -> float:
    need(last, 2)
    return mean([mean(scores(matrix, [(t, i) for t in range(1, i)])) for i in range(2, last + 1)])


def _unseen(matrix: AccuracyMatrix, last: int) -> float:
    if last == matrix.tasks:
        raise Undefined("every task of the stream was learned")
    return mean(scores(matrix, [(last, task) for task in range(last + 1, matrix.tasks + 1)]))


def _square(last: int) -> list[tuple[int, int]]:
    return [(row, task) for row in range(1, last + 1) for task in range(1, last + 1)]
