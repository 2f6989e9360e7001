"""``mmcl score <answers>``: score kept answers again, without the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mmcl.commands.words import CommandParser, UnknownWords
from mmcl.metrics import AccuracyMatrix, Answer, Scored, accuracy, find_scorer, grade, read_answers
from mmcl.metrics.llava import Joined, is_llava, join
from mmcl.metrics.scorers import SCORERS
from mmcl.report.tables import render
from mmcl.report.words import clean

NAMED_AT_MOST = 10
WIDEST = 10_000
_CELL = re.compile(r"row_(\d+)/col_(\d+)\.jsonl$")


@dataclass(frozen=True)
class Cell:
    """Answers to be scored together.

    Args:
        file: that holds them.
        row: when they were given, such as the task just learned; empty outside a run.
        column: what they are about.
        scorer: name or version of the recorded scorer, empty if none is.
        kept: the recorded score, None if there is none.
        truth: a LLaVA-style test file, None where the answers hold their truth.
    """

    file: Path
    row: str = ""
    column: str = ""
    scorer: str = ""
    kept: float | None = None
    truth: Path | None = None


@dataclass(frozen=True)
class Result:
    """A cell and its scores; ``found`` is None if the file is empty."""

    cell: Cell
    scorer: str
    count: int
    found: Scored | None
    faults: dict[str, list[str]] = field(default_factory=dict)


def main(argv: Sequence[str]) -> int:
    """Score answers again without the model: those of a run, or of a LLaVA-style repository."""
    parser = CommandParser(prog="mmcl score", description=main.__doc__)
    parser.add_argument(
        "answers", help="a file of answers, a folder answers/, or a run (its folder or its name)"
    )
    parser.add_argument(
        "--scorer", help=f"instead of the recorded one: {', '.join(SCORERS)}", metavar="NAME"
    )
    parser.add_argument(
        "--truth", type=Path, help="test file with the right answers, for LLaVA-style answers"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    if given.scorer is not None:
        _find(given.scorer)
    cells = list(_cells(_place(given.answers), given.truth))
    results = [_score(cell, given.scorer) for cell in cells]
    if given.json:
        print(json.dumps([_plain(result) for result in results], indent=1))
        return 0
    # Lines stay whole: a name that is cut into two cannot be copied.
    print(render(_table(results), WIDEST, is_coloured=False))
    for sentence in _sentences(results):
        print(clean(sentence))
    return 0


def _place(name: str) -> Path:
    for path in (Path(name), Path("runs") / name):
        if path.exists():
            return path
    raise UnknownWords(
        f"there are no answers at {name}: give a JSONL file of answers, a folder answers/, a run's "
        "folder, or its name under runs/"
    )


def _cells(path: Path, truth: Path | None) -> Iterator[Cell]:
    """Find what is to be scored, row by row.

    Raises:
        UnknownWords: if there is nothing, or ``truth`` is missing or not wanted.
    """
    if path.is_file() and is_llava(path):
        if truth is None or not truth.is_file():
            what = "none was given" if truth is None else f"{truth} is no file"
            raise UnknownWords(
                f"{path} holds answers as LLaVA writes them, without what is right, and {what}: "
                "give --truth test.json"
            )
        yield Cell(path, column=path.stem, truth=truth)
        return
    if truth is not None:
        raise UnknownWords(
            f"--truth is {truth}, but the answers at {path} hold what is right: leave --truth out"
        )
    if path.is_file():
        yield _recorded(path)
        return
    folder = path / "answers" if (path / "answers").is_dir() else path
    files = sorted(file for file in folder.glob("row_*/col_*.jsonl") if _numbers(file))
    if not files:
        raise UnknownWords(
            f"{path} holds no answers (row_00/col_00.jsonl ...): give a run that has scored a "
            "task, or one file of answers"
        )
    yield from map(_recorded, files)


def _recorded(file: Path) -> Cell:
    """Look up in the matrix of a run what a file of answers is about."""
    numbers = _numbers(file)
    if numbers is None:
        return Cell(file, column=file.stem)
    row, column = numbers
    path = file.resolve().parent.parent.parent / "matrix.json"
    if not path.is_file():
        return Cell(file, f"row {row}", f"column {column}")
    matrix = AccuracyMatrix.read(path)
    if row >= len(matrix.rows) or column >= len(matrix.columns):
        return Cell(file, f"row {row}", f"column {column}")
    what = matrix.columns[column]
    return Cell(file, matrix.rows[row], what.name, what.score, matrix.get(row, column))


def _numbers(file: Path) -> tuple[int, int] | None:
    found = _CELL.search(file.resolve().as_posix())
    return (int(found[1]), int(found[2])) if found is not None else None


def _score(cell: Cell, wanted: str | None) -> Result:
    faults: dict[str, list[str]] = {}
    if cell.truth is not None:
        joined = join(cell.file, cell.truth)
        answers, faults = joined.answers, _faults(joined)
    else:
        answers = read_answers(cell.file)
    if wanted is None and cell.scorer == "accuracy":
        # A class among classes: names may differ in case alone, so text is not compared.
        return Result(cell, "accuracy", len(answers), _as_recorded(answers), faults)
    scorer = _find(wanted or cell.scorer, cell)
    try:
        found = grade(answers, scorer)[1] if answers else None
    except ValueError as fault:
        raise UnknownWords(f"{cell.file} cannot be scored by {scorer.name}: {fault}") from None
    return Result(cell, scorer.version, len(answers), found, faults)


def _find(name: str, cell: Cell | None = None) -> Any:
    if not name and cell is not None:
        raise UnknownWords(
            f"nothing says how {cell.file} is scored: give --scorer, one of {', '.join(SCORERS)}"
        )
    try:
        return find_scorer(name)
    except ValueError as fault:
        raise UnknownWords(f"{fault} (--scorer chooses)") from None


def _as_recorded(answers: Sequence[Answer]) -> Scored | None:
    value = accuracy(answers)
    rows = [float(answer.correct) for answer in answers]
    return None if value is None else Scored(rows, rows, value, value)


def _faults(joined: Joined) -> dict[str, list[str]]:
    named = {"missing": joined.missing, "repeated": joined.repeated, "unknown": joined.unknown}
    return {what: names for what, names in named.items() if names}


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    has_rows = any(result.cell.row for result in results)
    has_kept = any(result.cell.kept is not None for result in results)
    heads = ["after", "column"] if has_rows else ["column"]
    for head in heads:
        table.add_column(head, no_wrap=True)
    for head in ("n", "strict", "lenient", *(["recorded"] if has_kept else [])):
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("scorer", "besides"):
        table.add_column(head, no_wrap=True)
    for result in results:
        cell, found = result.cell, result.found
        names = [cell.row, cell.column] if has_rows else [cell.column]
        values: list[float | None] = [None, None]
        if found is not None:
            values = [found.strict, found.lenient]
        values += [cell.kept] if has_kept else []
        extras = found.extras.items() if found is not None else ()
        table.add_row(
            *map(clean, names),
            str(result.count),
            *("-" if value is None else f"{100 * value:.2f}" for value in values),
            result.scorer,
            ", ".join(f"{name} {value:.4f}" for name, value in extras),
        )
    return table


def _sentences(results: Sequence[Result]) -> Iterator[str]:
    yield "strict, lenient: percent; lenient asks for the right answer in any form"
    meant = {
        "missing": "{} questions were not answered and count 0",
        "repeated": "{} questions were answered more than once, the first answer counts",
        "unknown": "{} answers are to questions that the truth lacks and do not count",
    }
    for result in results:
        for what, names in result.faults.items():
            named = ", ".join(names[:NAMED_AT_MOST])
            more = len(names) - NAMED_AT_MOST
            rest = f" and {more} more (--json names all)" if more > 0 else ""
            yield f"{result.cell.file}: {meant[what].format(len(names))}: {named}{rest}"


def _plain(result: Result) -> dict[str, Any]:
    cell, found = result.cell, result.found
    return {
        "file": str(cell.file),
        "row": cell.row,
        "column": cell.column,
        "n": result.count,
        "strict": None if found is None else found.strict,
        "lenient": None if found is None else found.lenient,
        "recorded": cell.kept,
        "scorer": result.scorer,
        "extras": {} if found is None else dict(found.extras),
        **{what: result.faults.get(what, []) for what in ("missing", "repeated", "unknown")},
    }
