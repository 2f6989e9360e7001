"""``mmcl rescore <answers>``: rescore stored predictions without the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.evaluation import (
    AccuracyMatrix,
    accuracy,
    find_scorer,
    read_predictions,
    rescore,
)
from mmcl.evaluation.predictions import ANSWERS, is_llava, join_llava
from mmcl.evaluation.run_files import MATRIX
from mmcl.evaluation.scorers import SCORERS
from mmcl.report.formatting import sanitize
from mmcl.report.tables import render

MAX_NAMED = 10
MAX_WIDTH = 10_000
_CELL = re.compile(r"row_(\d+)/col_(\d+)\.jsonl$")
_PROBLEMS = {
    "missing": "{} questions have no prediction and count 0",
    "repeated": "{} questions have several predictions, the first counts",
    "unknown": "{} predictions are for questions that the truth lacks and do not count",
}
"""Attribute of joined predictions -> sentence on the samples in it."""


@dataclass(frozen=True)
class Cell:
    """File of predictions, and its cell of a run's matrix.

    Args:
        file: JSON lines.
        row: name of the matrix row, empty outside a run.
        task: name of the task.
        scorer: name or version of the recorded scorer, empty if none is recorded.
        recorded: the recorded score, None if there is none.
        truth: test file in LLaVA's format, None where the file holds the right answers.
    """

    file: Path
    row: str = ""
    task: str = ""
    scorer: str = ""
    recorded: float | None = None
    truth: Path | None = None


def main(argv: Sequence[str]) -> int:
    """Rescore predictions without the model: those of a run, or of a LLaVA-style repository."""
    parser = CommandParser(prog="mmcl rescore", description=main.__doc__)
    parser.add_argument(
        "answers",
        help="run (its directory or name), its folder answers/, or one file of predictions",
    )
    parser.add_argument(
        "--scorer", help=f"scorer instead of the recorded one: {', '.join(SCORERS)}", metavar="NAME"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        help="test file with the right answers, for predictions in LLaVA's format",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    if given.scorer is not None:
        _find(given.scorer)
    cells = list(_cells(_locate(given.answers), given.truth))
    results = [_score(cell, given.scorer) for cell in cells]
    if given.json:
        print(json.dumps(results, indent=1))
        return 0
    # No line breaks in the table, so that names can be copied.
    print(render([_table(results)], MAX_WIDTH, is_colored=False))
    for sentence in _sentences(results):
        print(sanitize(sentence))
    return 0


def _locate(name: str) -> Path:
    for path in (Path(name), Path("runs") / name):
        if path.exists():
            return path
    raise UsageError(
        f"there are no predictions at {name}: give a JSONL file, answers/, a run directory "
        "or its name under runs/"
    )


def _cells(path: Path, truth: Path | None) -> Iterator[Cell]:
    """Find the files of predictions, row by row.

    Raises:
        UsageError: if there are none, or ``truth`` is missing or superfluous.
    """
    if path.is_file() and is_llava(path):
        if truth is None or not truth.is_file():
            what = "there is no --truth" if truth is None else f"{truth} is not a file"
            raise UsageError(
                f"{path} has LLaVA's format, without right answers, and {what}: "
                "give --truth test.json"
            )
        yield Cell(path, task=path.stem, truth=truth)
        return
    if truth is not None:
        raise UsageError(
            f"--truth is {truth}, but {path} holds the right answers: leave --truth out"
        )
    if path.is_file():
        yield _cell_of(path)
        return
    folder = path / ANSWERS if (path / ANSWERS).is_dir() else path
    files = sorted(file for file in folder.glob("row_*/col_*.jsonl") if _numbers(file))
    if not files:
        raise UsageError(
            f"{path} holds no predictions (row_00/col_00.jsonl ...): give a run that has evaluated "
            "a task, or one file of predictions"
        )
    yield from map(_cell_of, files)


def _cell_of(file: Path) -> Cell:
    """Look up the cell of a file of predictions in the run's matrix."""
    numbers = _numbers(file)
    if numbers is None:
        return Cell(file, task=file.stem)
    row, column = numbers
    path = file.resolve().parent.parent.parent / MATRIX
    if not path.is_file():
        return Cell(file, f"row {row}", f"column {column}")
    matrix = AccuracyMatrix.read(path)
    if row >= len(matrix.rows) or column >= len(matrix.columns):
        return Cell(file, f"row {row}", f"column {column}")
    task = matrix.columns[column]
    return Cell(file, matrix.rows[row], task.name, task.score, matrix.get(row, column))


def _numbers(file: Path) -> tuple[int, int] | None:
    found = _CELL.search(file.resolve().as_posix())
    return (int(found[1]), int(found[2])) if found is not None else None


def _score(cell: Cell, name: str | None) -> dict[str, Any]:
    """Score a file of predictions; return what ``--json`` prints of it."""
    extras: dict[str, float] = {}
    problems: dict[str, list[str]] = {what: [] for what in _PROBLEMS}
    if cell.truth is None:
        answers = read_predictions(cell.file)
    else:
        joined = join_llava(cell.file, cell.truth)
        answers = joined.answers
        problems = {what: list(getattr(joined, what)) for what in _PROBLEMS}
    if name is None and cell.scorer == "accuracy":
        # Class names may differ in case alone, so their text is not compared.
        version, strict = "accuracy", accuracy(answers)
        lenient = strict
    else:
        scorer = _find(name or cell.scorer, cell)
        try:
            found = rescore(answers, scorer)[1] if answers else None
        except ValueError as error:
            raise UsageError(f"{cell.file} cannot be scored by {scorer.name}: {error}") from None
        version, strict, lenient = scorer.version, None, None
        if found is not None:
            strict, lenient, extras = found.strict, found.lenient, dict(found.extras)
    return {
        "file": str(cell.file), "after": cell.row, "task": cell.task, "n": len(answers),
        "strict": strict, "lenient": lenient, "recorded": cell.recorded, "scorer": version,
        "extras": extras, **problems,
    }  # fmt: skip


def _find(name: str, cell: Cell | None = None) -> Any:
    if not name and cell is not None:
        raise UsageError(
            f"no scorer is recorded for {cell.file}: give --scorer, one of {', '.join(SCORERS)}"
        )
    try:
        return find_scorer(name)
    except ValueError as error:
        raise UsageError(f"{error} (option --scorer)") from None


def _table(results: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    heads = ["after", "task"] if any(result["after"] for result in results) else ["task"]
    has_recorded = any(result["recorded"] is not None for result in results)
    scores = ["strict", "lenient", *(["recorded"] if has_recorded else [])]
    for head in heads:
        table.add_column(head, no_wrap=True)
    for head in ("n", *scores):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("scorer", "more"):
        table.add_column(head, no_wrap=True)
    for result in results:
        values = [result[name] for name in scores]
        table.add_row(
            *(sanitize(result[head]) for head in heads),
            str(result["n"]),
            *("-" if value is None else f"{100 * value:.2f}" for value in values),
            result["scorer"],
            ", ".join(f"{name} {value:.4f}" for name, value in result["extras"].items()),
        )
    return table


def _sentences(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "strict, lenient: percent; lenient counts the right answer in any form"
    for result in results:
        for what, names in ((what, result[what]) for what in _PROBLEMS if result[what]):
            named = ", ".join(names[:MAX_NAMED])
            more = len(names) - MAX_NAMED
            rest = f" and {more} more (--json lists all)" if more > 0 else ""
            yield f"{result['file']}: {_PROBLEMS[what].format(len(names))}: {named}{rest}"
