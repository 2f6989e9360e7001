"""``mmcl rescore <answers>``: rescore stored predictions without the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.evaluation import (
    AccuracyMatrix,
    Prediction,
    ScoreResult,
    accuracy,
    find_scorer,
    read_predictions,
    rescore,
)
from mmcl.evaluation.llava_predictions import JoinedPredictions, is_llava, join
from mmcl.evaluation.run_files import ANSWERS, MATRIX
from mmcl.evaluation.scorers import SCORERS
from mmcl.report.formatting import sanitize
from mmcl.report.tables import render

MAX_NAMED = 10
MAX_WIDTH = 10_000
_CELL = re.compile(r"row_(\d+)/col_(\d+)\.jsonl$")


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


@dataclass(frozen=True)
class Result:
    """Scores of a cell; ``found`` is None if the file is empty."""

    cell: Cell
    scorer: str
    count: int
    found: ScoreResult | None
    errors: dict[str, list[str]] = field(default_factory=dict)


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
        print(json.dumps([_plain(result) for result in results], indent=1))
        return 0
    # No line breaks in the table, so that names can be copied.
    print(render(_table(results), MAX_WIDTH, is_colored=False))
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


def _score(cell: Cell, name: str | None) -> Result:
    errors: dict[str, list[str]] = {}
    if cell.truth is not None:
        joined = join(cell.file, cell.truth)
        answers, errors = joined.answers, _errors(joined)
    else:
        answers = read_predictions(cell.file)
    if name is None and cell.scorer == "accuracy":
        # Class names may differ in case alone, so their text is not compared.
        return Result(cell, "accuracy", len(answers), _as_recorded(answers), errors)
    scorer = _find(name or cell.scorer, cell)
    try:
        found = rescore(answers, scorer)[1] if answers else None
    except ValueError as error:
        raise UsageError(f"{cell.file} cannot be scored by {scorer.name}: {error}") from None
    return Result(cell, scorer.version, len(answers), found, errors)


def _find(name: str, cell: Cell | None = None) -> Any:
    if not name and cell is not None:
        raise UsageError(
            f"no scorer is recorded for {cell.file}: give --scorer, one of {', '.join(SCORERS)}"
        )
    try:
        return find_scorer(name)
    except ValueError as error:
        raise UsageError(f"{error} (option --scorer)") from None


def _as_recorded(answers: Sequence[Prediction]) -> ScoreResult | None:
    value = accuracy(answers)
    per_sample = [float(answer.correct) for answer in answers]
    return None if value is None else ScoreResult(per_sample, per_sample, value, value)


def _errors(joined: JoinedPredictions) -> dict[str, list[str]]:
    named = {"missing": joined.missing, "repeated": joined.repeated, "unknown": joined.unknown}
    return {what: names for what, names in named.items() if names}


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    has_rows = any(result.cell.row for result in results)
    has_recorded = any(result.cell.recorded is not None for result in results)
    heads = ["after", "task"] if has_rows else ["task"]
    for head in heads:
        table.add_column(head, no_wrap=True)
    for head in ("n", "strict", "lenient", *(["recorded"] if has_recorded else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("scorer", "more"):
        table.add_column(head, no_wrap=True)
    for result in results:
        cell, found = result.cell, result.found
        names = [cell.row, cell.task] if has_rows else [cell.task]
        values: list[float | None] = [None, None]
        if found is not None:
            values = [found.strict, found.lenient]
        values += [cell.recorded] if has_recorded else []
        extras = found.extras.items() if found is not None else ()
        table.add_row(
            *map(sanitize, names),
            str(result.count),
            *("-" if value is None else f"{100 * value:.2f}" for value in values),
            result.scorer,
            ", ".join(f"{name} {value:.4f}" for name, value in extras),
        )
    return table


def _sentences(results: Sequence[Result]) -> Iterator[str]:
    yield "strict, lenient: percent; lenient counts the right answer in any form"
    messages = {
        "missing": "{} questions have no prediction and count 0",
        "repeated": "{} questions have several predictions, the first counts",
        "unknown": "{} predictions are for questions that the truth lacks and do not count",
    }
    for result in results:
        for what, names in result.errors.items():
            named = ", ".join(names[:MAX_NAMED])
            more = len(names) - MAX_NAMED
            rest = f" and {more} more (--json lists all)" if more > 0 else ""
            yield f"{result.cell.file}: {messages[what].format(len(names))}: {named}{rest}"


def _plain(result: Result) -> dict[str, Any]:
    cell, found = result.cell, result.found
    return {
        "file": str(cell.file),
        "after": cell.row,
        "task": cell.task,
        "n": result.count,
        "strict": None if found is None else found.strict,
        "lenient": None if found is None else found.lenient,
        "recorded": cell.recorded,
        "scorer": result.scorer,
        "extras": {} if found is None else dict(found.extras),
        **{what: result.errors.get(what, []) for what in ("missing", "repeated", "unknown")},
    }
