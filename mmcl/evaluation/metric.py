"""Metric value: one number with its definition, or the reason why it is undefined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mmcl.evaluation.matrix import AccuracyMatrix


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


def compute_metric(name: str, definition: str, compute: Callable[[], float]) -> MetricValue:
    """Compute a metric, or give the reason why it is undefined."""
    try:
        return MetricValue(name, compute(), definition, None)
    except Undefined as gap:
        return MetricValue(name, None, definition, str(gap))


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


def scores(matrix: AccuracyMatrix, cells: Iterable[tuple[int, int]]) -> list[float]:
    """Return the scores a[row][task] of several cells; Undefined if one was not measured."""
    return [score(matrix, row, task) for row, task in cells]


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


def require_tasks(count: int, least: int) -> None:
    """Raise Undefined unless at least ``least`` tasks (1 or 2) are learned."""
    if count < least:
        raise Undefined("no task is learned yet" if least == 1 else "needs two learned tasks")
