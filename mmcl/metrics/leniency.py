"""What is right in another form than was asked for: lenient scores beside the strict ones.

A model may forget how to answer (in one word, by a letter) and still know the answer. Generated
answers are scored twice, strictly and whatever their form; the difference is form alone.
"""

from __future__ import annotations

from pathlib import Path

from mmcl.metrics.figure import Figure, define, mean, need, row_of, scores
from mmcl.metrics.learning import average_accuracy, forgetting
from mmcl.metrics.matrix import AccuracyMatrix

LENIENT_MAIN = "lenient average accuracy"


def lenient_file(folder: Path) -> Path:
    """Say where a run keeps its lenient scores, a matrix like its matrix.json."""
    return folder / "lenient.json"


def read_lenient(matrix: AccuracyMatrix, folder: Path) -> AccuracyMatrix | None:
    """Read the lenient scores of the cells that a matrix has measured.

    Args:
        matrix: strict scores; cells that it lacks are left out of the result.
        folder: of the run.

    Returns:
        a matrix of the same shape, None if the run has no lenient scores.

    Raises:
        ValueError: if the file is no matrix.
    """
    file = lenient_file(folder)
    return lenient_beside(matrix, file) if file.is_file() else None


def lenient_beside(matrix: AccuracyMatrix, file: Path) -> AccuracyMatrix:
    """Make a matrix of the same shape with the cells of a file, where both are measured."""
    lenient = _empty_like(matrix).with_cells_of(file)
    for cell in matrix.missing():
        lenient.set(*cell, None)
    return lenient


def lenient_figures(
    strict: AccuracyMatrix, lenient: AccuracyMatrix, after: int | None = None
) -> list[Figure]:
    """Compute what is known whatever its form, and how much the form alone costs.

    Columns that are not answered in words have one score, which counts as both.

    Args:
        strict: the scores.
        lenient: of the same shape, the scores that forgive the form.
        after: number of learned tasks, None for the last row of ``strict`` that is measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    last = row_of(strict, after)
    whole = _with_columns_without_words(lenient, strict)
    known, lost = average_accuracy(whole, last), forgetting(whole, last)

    def gap() -> float:
        need(last, 1)
        cells = [(last, task) for task in range(1, last + 1)]
        pairs = zip(scores(whole, cells), scores(strict, cells), strict=True)
        return mean([free - bound for free, bound in pairs])

    said = "l = score in any form"
    average = f"1/T sum over i of l[T][i], {said}"
    highest = f"1/(T-1) sum over i < T of (max over t in i..T-1 of l[t][i] - l[T][i]), {said}"
    return [
        Figure(LENIENT_MAIN, known.value, average, known.reason),
        Figure("lenient forgetting", lost.value, highest, lost.reason),
        define("format gap", f"1/T sum over i of (l[T][i] - a[T][i]), {said}", gap),
    ]


def _empty_like(matrix: AccuracyMatrix) -> AccuracyMatrix:
    tasks, probes = matrix.columns[: matrix.tasks], matrix.columns[matrix.tasks :]
    return AccuracyMatrix(matrix.stream, matrix.scenario, tasks, probes, matrix.rows)


def _with_columns_without_words(lenient: AccuracyMatrix, strict: AccuracyMatrix) -> AccuracyMatrix:
    whole = _empty_like(strict)
    for row in range(len(strict.rows)):
        for place, column in enumerate(strict.columns):
            source = lenient if column.kind == "answer" else strict
            whole.set(row, place, source.get(row, place))
    return whole
