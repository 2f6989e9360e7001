"""Lenient metrics: scores that ignore the form of an answer, and the format gap to strict scores.

A model may forget how to answer (in one word, by a letter) and still know the answer. Generated
answers are scored twice, strictly and leniently; the difference is the form alone.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from mmcl.evaluation.continual_metrics import average_accuracy, forgetting
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.metric import MetricValue, compute_metric, require_tasks, row_of, scores

LENIENT_MAIN = "lenient average accuracy"


def align_lenient_matrix(matrix: AccuracyMatrix, file: Path) -> AccuracyMatrix:
    """Make a lenient matrix of the same shape from a file, without cells that ``matrix`` lacks."""
    lenient = _empty_like(matrix).with_cells_of(file)
    for cell in matrix.missing():
        lenient.set(*cell, None)
    return lenient


def compute_lenient_metrics(
    strict: AccuracyMatrix, lenient: AccuracyMatrix, after: int | None = None
) -> list[MetricValue]:
    """Compute the lenient average accuracy, lenient forgetting and the format gap.

    A column without generated answers has one score, which counts as both.

    Args:
        strict: the scores.
        lenient: of the same shape, scores in any form.
        after: number of learned tasks, None for the last row of ``strict`` that is measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    last = row_of(strict, after)
    whole = _with_other_columns(lenient, strict)
    known, lost = average_accuracy(whole, last), forgetting(whole, last)

    def gap() -> float:
        require_tasks(last, 1)
        cells = [(last, task) for task in range(1, last + 1)]
        pairs = zip(scores(whole, cells), scores(strict, cells), strict=True)
        return fmean([free - bound for free, bound in pairs])

    note = "l = score in any form"
    average = f"1/T sum over i of l[T][i], {note}"
    highest = f"1/(T-1) sum over i < T of (max over t in i..T-1 of l[t][i] - l[T][i]), {note}"
    return [
        MetricValue(LENIENT_MAIN, known.value, average, known.reason),
        MetricValue("lenient forgetting", lost.value, highest, lost.reason),
        compute_metric("format gap", f"1/T sum over i of (l[T][i] - a[T][i]), {note}", gap),
    ]


def _empty_like(matrix: AccuracyMatrix) -> AccuracyMatrix:
    tasks, eval_only = matrix.columns[: matrix.tasks], matrix.columns[matrix.tasks :]
    return AccuracyMatrix(matrix.stream, matrix.scenario, tasks, eval_only, matrix.rows)


def _with_other_columns(lenient: AccuracyMatrix, strict: AccuracyMatrix) -> AccuracyMatrix:
    """Take the strict scores of columns without generated answers."""
    filled = _empty_like(strict)
    for row in range(len(strict.rows)):
        for index, column in enumerate(strict.columns):
            source = lenient if column.task_type == "instruction" else strict
            filled.set(row, index, source.get(row, index))
    return filled
