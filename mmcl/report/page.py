"""report.html: one run on one page that needs no network and no other file."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mmcl.core.atomic import write_atomic
from mmcl.metrics.answers import RIGHT_FROM, Answer
from mmcl.metrics.cost import Ledger
from mmcl.metrics.figures import MAIN, Figure, all_figures, average_accuracy, forgetting
from mmcl.metrics.leniency import lenient_figures
from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.report import plots
from mmcl.report.formplot import form_bars
from mmcl.report.html import inline_svg, render_template
from mmcl.report.rundir import RunDirectory, Sample
from mmcl.report.tables import UNMEASURED
from mmcl.report.words import percent, points

# Captions have several right answers, VQA ten people's.
_MOST_RIGHT = 5

_CAPTIONS = {
    "matrix": (
        "Accuracy matrix",
        "Score in percent of every task (column) after each task learned (row). A frame marks the "
        "task just learned, a dot what was not measured.",
    ),
    "average": (
        "Seen tasks and tasks to come",
        "Mean score of the tasks learned so far, and of those the model has not met yet.",
    ),
    "curves": (
        "Each task over training",
        "Dotted until the task is learned, a mark where it is.",
    ),
    "forgetting": (
        "Forgetting per task",
        "How far each task is below its best earlier score. A negative value is a gain.",
    ),
    "form": (
        "Format lost, knowledge kept",
        "Answers after the last task: right in the form that was asked for, and right only if the "
        "form is forgiven (a sentence in place of a word, words in place of a letter).",
    ),
    "cost": ("Time and memory", "Training time and what the strategy keeps after each task."),
}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``figures/`` of a run from what it has left so far.

    Reads matrix.json, lenient.json, summary.json, ledger.json, config.yaml, figures/samples.json
    and answers/.
    A part that is missing leaves its section out; one that cannot be read is named on the page.

    Args:
        folder: of the run, finished or not.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    run = RunDirectory.read(folder)
    drawn = _draw(run.matrix, run.ledger) | _draw_form(run)
    for name, svg in drawn.items():
        write_atomic(folder / "figures" / f"{name}.svg", svg)
    if run.matrix is not None:
        write_atomic(folder / "figures" / "matrix.png", plots.heat_map(run.matrix, "png"))
    page = render_template("template.html.j2", _values(run, drawn))
    path = folder / "report.html"
    write_atomic(path, page)
    return path


def _draw(matrix: AccuracyMatrix | None, ledger: Ledger | None) -> dict[str, bytes]:
    drawn: dict[str, bytes] = {}
    if matrix is not None:
        drawn["matrix"] = plots.heat_map(matrix)
        after = matrix.last_complete_row or 0
        if after:
            drawn["average"] = plots.seen_and_unseen(matrix)
            drawn["curves"] = plots.task_curves(matrix)
        if after > 1:
            drawn["forgetting"] = plots.forgetting_bars(matrix, after)
    if ledger is not None and len(ledger):
        drawn["cost"] = plots.cost_bars(ledger)
    return drawn


def _draw_form(run: RunDirectory) -> dict[str, bytes]:
    matrix, after = run.matrix, run.matrix.last_complete_row if run.matrix else None
    if matrix is None or run.lenient is None or not after:
        return {}
    return {"form": form_bars(matrix, run.lenient, after)}


def _values(run: RunDirectory, drawn: dict[str, bytes]) -> dict[str, Any]:
    summary, matrix = run.summary, run.matrix
    figures = _figures(run)
    warnings = [*(summary.warnings if summary else ()), *run.notes]
    return {
        "name": summary.name if summary else run.folder.resolve().name,
        "facts": _facts(run),
        "state": _state(run),
        "is_finished": bool(summary and summary.finished),
        "warnings": warnings,
        "cards": [each for each in figures if each.name in MAIN],
        "figures": figures,
        "plots": {name: _plot(name, svg) for name, svg in drawn.items()},
        "scores": sorted({column.score for column in matrix.columns}) if matrix else [],
        "forms": _forms(run),
        "after": matrix.last_complete_row or 0 if matrix else 0,
        "costs": list(run.ledger) if run.ledger else [],
        "total": run.ledger.total() if run.ledger else None,
        "samples": [_picture(sample) for sample in run.samples],
        "asks": any(sample.question for sample in run.samples),
        "faults": _faults(run),
        "config": run.config,
        "versions": summary.versions if summary else {},
        "hashes": summary.hashes if summary else {},
    }


def _figures(run: RunDirectory) -> list[Figure]:
    if run.summary is not None and run.summary.figures:
        return list(run.summary.figures)
    if run.matrix is None or run.matrix.last_row is None:
        return []
    after = run.matrix.last_complete_row or 0
    lenient = [] if run.lenient is None else lenient_figures(run.matrix, run.lenient, after)
    return all_figures(run.matrix, after) + lenient


def _forms(run: RunDirectory) -> list[tuple[str, str, str, str]]:
    """Give lines of name, strict, lenient and difference: tasks, then their mean and forgetting."""
    matrix, lenient = run.matrix, run.lenient
    after = matrix.last_complete_row if matrix is not None else None
    if matrix is None or lenient is None or not after:
        return []
    cells = [(matrix.get(after, task), lenient.get(after, task)) for task in range(after)]
    lines = [
        _form(name, *pair, "accuracy") for name, pair in zip(matrix.names, cells, strict=False)
    ]
    known, lost, _ = lenient_figures(matrix, lenient, after)
    lines.append(_form("average", average_accuracy(matrix, after).value, known.value, "accuracy"))
    if lost.value is not None:
        lines.append(_form("forgetting", forgetting(matrix, after).value, lost.value, "forgetting"))
    return lines


def _form(
    name: str, strict: float | None, lenient: float | None, kind: str
) -> tuple[str, str, str, str]:
    shown = [UNMEASURED if value is None else points(kind, value) for value in (strict, lenient)]
    if strict is None or lenient is None:
        return name, shown[0], shown[1], UNMEASURED
    change = strict - lenient if kind == "forgetting" else lenient - strict
    return name, shown[0], shown[1], f"{100 * change:+.1f}"


def _facts(run: RunDirectory) -> list[tuple[str, str]]:
    summary, matrix = run.summary, run.matrix
    facts: list[tuple[str, str]] = []
    if summary is not None:
        facts += [("strategy", summary.strategy), ("model", summary.model)]
        facts += [("stream", summary.stream), ("scenario", f"{summary.scenario}-incremental")]
        facts += [("seed", str(summary.seed))]
    elif matrix is not None:
        facts += [("stream", matrix.stream), ("scenario", f"{matrix.scenario}-incremental")]
    if matrix is not None:
        facts.append(("tasks", str(matrix.tasks)))
    return facts


def _state(run: RunDirectory) -> str:
    if run.summary is not None and run.summary.finished:
        return "finished"
    if run.matrix is None or run.matrix.last_complete_row is None:
        return "no task learned yet"
    return f"stands after task {run.matrix.last_complete_row} of {run.matrix.tasks}"


def _faults(run: RunDirectory) -> list[str]:
    faults = run.summary.faults if run.summary else ()
    return [each if isinstance(each, str) else " · ".join(each.values()) for each in faults]


def _plot(name: str, svg: bytes) -> dict[str, str | Markup]:
    title, text = _CAPTIONS[name]
    return {"title": title, "text": text, "svg": inline_svg(svg, name, title)}


def _picture(sample: Sample) -> dict[str, Any]:
    picture = base64.b64encode(sample.picture_png).decode("ascii")
    source = f"data:image/png;base64,{picture}" if picture else ""
    right = sample.right_answers
    return {
        "sample": sample,
        "source": source,
        "right": right[:_MOST_RIGHT],
        "more": len(right) - _MOST_RIGHT,
        "said": {row: {"answer": a, "mark": _mark(a)} for row, a in sample.answers.items()},
    }


def _mark(answer: Answer) -> dict[str, str]:
    """Choose the sign before an answer: right, there but not in the form asked for, or wrong."""
    share = "" if answer.strict in (None, 0.0, 1.0) else percent(answer.strict or 0.0)
    if answer.correct:
        return {"sign": "✓", "kind": "right", "title": "right", "share": share}
    if (answer.lenient or 0.0) >= RIGHT_FROM:
        title = "the right answer, not in the form asked for"
        return {"sign": "≈", "kind": "near", "title": title, "share": share}
    return {"sign": "✗", "kind": "wrong", "title": "wrong", "share": share}
