"""Figure: one number with its definition, or the reason why it has no value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from mmcl.metrics.matrix import AccuracyMatrix


@dataclass(frozen=True)
class Figure:
    """One number of a run.

    Args:
        name: what it is called.
        value: the number, None if it is undefined.
        definition: how it is computed; a[t][i] is the score of task i after task t, t = 0 before
            training.
        reason: why there is no value, None if there is one.
    """

    name: str
    value: float | None
    definition: str
    reason: str | None = None


class Undefined(Exception):
    """Raised inside a computation whose figure has no value; the text is the reason."""


def define(name: str, definition: str, compute: Callable[[], float]) -> Figure:
    """Compute a figure, or say why it cannot be computed."""
    try:
        return Figure(name, compute(), definition, None)
    except Undefined as gap:
        return Figure(name, None, definition, str(gap))


def score(matrix: AccuracyMatrix, row: int, task: int) -> float:
    """Give a[row][task], tasks counted from 1.

    Raises:
        Undefined: if it was not measured.
    """
    if row >= len(matrix.rows):
        raise Undefined(f"row {row} is not there yet: only {len(matrix.rows) - 1} tasks are done")
    value = matrix.get(row, task - 1)
    if value is None:
        raise Undefined(
            f"not measured: {matrix.names[task - 1]!r} in row {row} ({matrix.rows[row]})"
        )
    return value


def scores(matrix: AccuracyMatrix, cells: Iterable[tuple[int, int]]) -> list[float]:
    """Give a[row][task] of several cells; Undefined if one was not measured."""
    return [score(matrix, row, task) for row, task in cells]


def mean(values: Sequence[float]) -> float:
    """Average values with one rounding, in any order the same."""
    return math.fsum(values) / len(values)


def row_of(matrix: AccuracyMatrix, after: int | None) -> int:
    """Say which row "after" means: a number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if the stream has fewer tasks.
    """
    if after is None:
        return matrix.last_row or 0
    if not 0 <= after <= matrix.tasks:
        raise ValueError(f"after is {after}: give 0 (before training) to {matrix.tasks} tasks")
    return after


def need(count: int, least: int) -> None:
    """Raise Undefined unless at least so many tasks (1 or 2) are learned."""
    if count < least:
        raise Undefined("no task is learned yet" if least == 1 else "needs two learned tasks")
