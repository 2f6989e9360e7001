"""``mmcl rescore <answers>``: rescore stored predictions, also of other programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from mmcl.evaluation.foreign_predictions import (
    ForeignPredictions,
    is_own_format,
    read_foreign,
)
from mmcl.evaluation.predictions import ANSWERS
from mmcl.evaluation.record_files import SUFFIXES, UnknownLayout
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
    "several": "{} samples have several responses, the first counts",
    "differing": "{} predictions have a prompt without the question that has their id in the truth",
}
"""Attribute of ``ForeignPredictions`` -> sentence on the samples in it."""
ANNOTATED = ("vqa", "textvqa")
"""Scorers that compare with the answers of all annotators."""


@dataclass(frozen=True)
class Cell:
    """File of predictions, and its cell of a run's matrix.

    Args:
        file: JSON lines.
        row: name of the matrix row, empty outside a run.
        task: name of the task.
        scorer: name or version of the recorded scorer, empty if none is recorded.
        recorded: the recorded score, None if there is none.
        foreign: predictions of another program, None for a file of mmcl's.
    """

    file: Path
    row: str = ""
    task: str = ""
    scorer: str = ""
    recorded: float | None = None
    foreign: ForeignPredictions | None = None


def main(argv: Sequence[str]) -> int:
    """Rescore predictions without the model: those of a run, or of another program.

    Other programs: samples of lm-eval and lmms-eval, tables of VLMEvalKit, LLaMA-Factory and
    ms-swift, and with --truth answers in the format of LLaVA, VQAv2 and GQA.
    """
    parser = CommandParser(prog="mmcl rescore", description=main.__doc__)
    parser.add_argument(
        "answers",
        help="run (its directory or name), its folder answers/, one file of predictions, or a "
        "folder of files of another program",
    )
    parser.add_argument(
        "--scorer", help=f"scorer instead of the recorded one: {', '.join(SCORERS)}", metavar="NAME"
    )
    parser.add_argument(
        "--truth",
        type=Path,
        help="file with the right answers (LLaVA, VQAv2, TextVQA, GQA, ScienceQA, POPE ...), for "
        "predictions without them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(argv)
    if given.scorer is not None:
        _find(given.scorer)
    skipped: list[str] = []
    cells = list(_cells(_locate(given.answers), given.truth, given.scorer, skipped))
    results = [_score(cell, given.scorer) for cell in cells]
    if given.json:
        print(json.dumps(results, indent=1))
        return 0
    # No line breaks in the table, so that names can be copied.
    print(render([_table(results)], MAX_WIDTH, is_colored=False))
    for sentence in (*_sentences(results), *skipped):
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


def _cells(
    path: Path, truth: Path | None, scorer: str | None, skipped: list[str]
) -> Iterator[Cell]:
    """Find the files of predictions, row by row.

    Args:
        path: run directory, folder or file.
        truth: file of right answers.
        scorer: name of the scorer, None = the recorded one.
        skipped: gets a sentence for every file of a folder that holds no predictions.

    Raises:
        UsageError: if there are none, or ``truth`` is missing or superfluous.
    """
    if path.is_file() and not is_own_format(path):
        try:
            yield from _foreign_cells(path, truth, scorer)
        except UnknownLayout as error:
            raise UsageError(str(error)) from None
        return
    folder = path / ANSWERS if (path / ANSWERS).is_dir() else path
    files = sorted(file for file in folder.glob("row_*/col_*.jsonl") if _numbers(file))
    if truth is not None and (path.is_file() or files):
        raise UsageError(
            f"--truth is {truth}, but {path} holds the right answers: leave --truth out"
        )
    if path.is_file():
        yield _cell_of(path)
    elif files:
        yield from map(_cell_of, files)
    else:
        yield from _folder_cells(path, truth, scorer, skipped)


def _folder_cells(
    folder: Path, truth: Path | None, scorer: str | None, skipped: list[str]
) -> Iterator[Cell]:
    """Read the files of a folder, such as lm-eval's output, one cell for every task."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in SUFFIXES]
    is_found = False
    for file in files:
        if is_own_format(file):
            continue
        try:
            for cell in _foreign_cells(file, truth, scorer):
                is_found = True
                # Of several models' folders, tasks have equal names.
                inside = file.parent.relative_to(folder)
                yield replace(cell, task=(inside / cell.task).as_posix())
        except UnknownLayout as error:
            skipped.append(f"left out: {error}")
    if not is_found:
        named = f". What it holds: {'; '.join(skipped[:3])}" if skipped else ""
        raise UsageError(
            f"{folder} holds no predictions (row_00/col_00.jsonl ...): give a run that has "
            f"evaluated a task, or one file of predictions{named}"
        )


def _foreign_cells(path: Path, truth: Path | None, scorer: str | None) -> Iterator[Cell]:
    annotators = scorer is not None and scorer.partition("/")[0] in ANNOTATED
    for found in read_foreign(path, truth, annotators):
        yield Cell(path, task=found.task, foreign=found)


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
    foreign = cell.foreign
    answers = read_predictions(cell.file) if foreign is None else foreign.answers
    problems = {what: list(getattr(foreign, what, ())) for what in _PROBLEMS}
    if name is None and cell.scorer == "accuracy":
        # Class names may differ in case alone, so their text is not compared.
        version, strict = "accuracy", accuracy(answers)
        lenient = strict
    else:
        scorer = _find(name or cell.scorer, cell)
        groups = () if foreign is None else foreign.groups
        if scorer.name == "mme" and not groups:
            raise UsageError(
                f"{cell.file} lacks the category and image of questions, which mme compares: give "
                "question_id as category/image, or category and image_path; or score with pope"
            )
        try:
            found = rescore(answers, scorer, groups)[1] if answers else None
        except ValueError as error:
            raise UsageError(f"{cell.file} cannot be scored by {scorer.name}: {error}") from None
        version, strict, lenient = scorer.version, None, None
        if found is not None:
            strict, lenient, extras = found.strict, found.lenient, dict(found.extras)
    percent = {
        name: None if value is None else round(100 * value, 2)
        for name, value in (("strict", strict), ("lenient", lenient))
    }
    return {
        "file": str(cell.file), "after": cell.row, "task": cell.task, "n": len(answers),
        "strict": strict, "lenient": lenient, "percent": percent, "recorded": cell.recorded,
        "scorer": version, "extras": extras, **problems,
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
