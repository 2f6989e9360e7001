"""Report page of a run: report.html, which needs no network and no other file."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation.class_metrics import (
    ClassMetrics,
    ConfusionMatrix,
    compute_class_metrics,
    confusion_matrix,
)
from mmcl.evaluation.continual_metrics import (
    MAIN,
    MetricValue,
    Undefined,
    average_accuracy,
    compute_all_metrics,
    compute_lenient_metrics,
    forgetting,
)
from mmcl.evaluation.declared_metrics import TIME, compute_declared_metrics, probe_grid
from mmcl.evaluation.diagnostic_record import Diagnostic
from mmcl.evaluation.predictions import RIGHT_FROM, Prediction
from mmcl.evaluation.run_files import (
    CLASSES,
    CONFUSION,
    FIGURES,
    RECALLS,
    REPORT,
    RunFiles,
    SamplePredictions,
)
from mmcl.report import plots
from mmcl.report.diagnostic_output import draw_diagnostic
from mmcl.report.formatting import format_metric, percent
from mmcl.report.html import inline_svg, render_template
from mmcl.report.plot_style import ACCENT, WARM
from mmcl.report.tables import UNMEASURED, classes_csv, confusion_csv, retrieval_csv

# Captions have several right answers, VQA those of ten annotators.
_MAX_RIGHT = 5
# More classes are grouped in the plot and cut in the table, so that the page stays small.
_MAX_CLASSES = 60
# confusion.csv has a cell for every pair.
_MAX_CSV_CLASSES = 1000

_CAPTIONS = {
    "matrix": (
        "Accuracy matrix",
        "Score in percent of every task (column) after each learned task (row). A frame marks the "
        "task just learned, a dot what was not measured.",
    ),
    "shift": (
        "Shift from task to task",
        "Score in percent by what was trained last (row) and what is tested (column). The frames "
        "are in-domain, left of them is backward, right of them forward.",
    ),
    "average": (
        "Seen and unseen tasks",
        "Mean score of the tasks learned so far, and of those not learned yet.",
    ),
    "curves": (
        "Each task over training",
        "Score of each task: dotted until the task is learned, with a mark where it is.",
    ),
    "forgetting": (
        "Forgetting per task",
        "Best earlier score of each task minus its score now. A negative value is a gain.",
    ),
    "form": (
        "Format lost, knowledge kept",
        "Answers after the last task: right in the requested form, and right only in another form "
        "(a sentence instead of a word, words instead of a letter).",
    ),
    "confusion": (
        "Confusion matrix",
        "Test samples of each class (row) by predicted class (column), in percent of the row.",
    ),
    "cost": (
        "Time and memory",
        "Training time, and what the strategy stores after each task.",
    ),
}


@dataclass(frozen=True)
class _Classes:
    """Metrics of the classes after a number of tasks, and their confusion matrix or why none."""

    after: int
    metrics: list[ClassMetrics]
    confusion: ConfusionMatrix | None
    note: str = ""


def write_report(folder: Path, after_task: int | None = None) -> Path:
    """Write the report page ``report.html`` and the plots in ``figures/`` of a run.

    Reads the files of ``mmcl.evaluation.run_files``. A missing file leaves its section out; one
    that cannot be read is named on the page. A run with classification tasks gets ``classes.csv``
    and, up to 1,000 classes, ``confusion.csv``; one with captions gets ``retrieval.csv``.

    Args:
        folder: run directory, finished or not.
        after_task: number of learned tasks after which classes are shown, None = all measured.

    Returns:
        path of the page.

    Raises:
        FileNotFoundError: if there is no such directory.
        ValueError: if ``after_task`` is not a measured row with a classification task learned.
    """
    run = RunFiles.read(folder)
    classes = _class_results(run, after_task)
    _write_classes(run, classes)
    drawn = _draw(run, classes)
    for name, svg in drawn.items():
        write_atomic(folder / FIGURES / f"{name}.svg", svg)
    if run.matrix is not None:
        write_atomic(folder / FIGURES / "matrix.png", plots.heat_map(run.matrix, "png"))
    page = folder / REPORT
    write_atomic(page, render_template("template.html.j2", _values(run, drawn, classes)))
    return page


def _class_results(run: RunFiles, after_task: int | None) -> _Classes | None:
    """Compute the metrics of the classes, None if no classification task is learned."""
    matrix = run.matrix
    after = after_task
    if after is None:
        after = matrix.last_complete_row if matrix is not None else None
    learned = matrix.columns[: max(after or 0, 0)] if matrix is not None else ()
    has_classes = any(column.task_type == "classification" for column in learned)
    measured = (matrix.last_row or 0) if matrix is not None else 0
    if after_task is not None and not (1 <= after_task <= measured and has_classes):
        raise ValueError(
            f"after_task is {after_task}, and {measured} tasks are measured: give 1 to {measured}, "
            f"with a classification task among the first {after_task}"
        )
    if matrix is None or after is None or not has_classes:
        return None
    metrics = compute_class_metrics(matrix, run.confusions, after)
    try:
        return _Classes(after, metrics, confusion_matrix(matrix, run.confusions, after))
    except Undefined as gap:
        return _Classes(after, metrics, None, f"There is no confusion matrix: {gap}.")


def _write_classes(run: RunFiles, classes: _Classes | None) -> None:
    """Write classes.csv, confusion.csv, retrieval.csv; one that cannot be made now is removed."""
    files = dict.fromkeys((CLASSES, CONFUSION, RECALLS), "")
    if run.retrieval:
        files[RECALLS] = retrieval_csv(run.retrieval)
    if classes is not None and run.matrix is not None:
        if classes.metrics:
            files[CLASSES] = classes_csv(classes.metrics)
        confusion = classes.confusion
        if confusion is not None and len(confusion.classes) <= _MAX_CSV_CLASSES:
            files[CONFUSION] = confusion_csv(confusion, run.matrix.rows[classes.after])
    for name, text in files.items():
        if text:
            write_atomic(run.folder / name, text.encode("utf-8", "replace"))
        else:
            (run.folder / name).unlink(missing_ok=True)


def _draw(run: RunFiles, classes: _Classes | None) -> dict[str, bytes]:
    matrix, ledger = run.matrix, run.ledger
    drawn: dict[str, bytes] = {}
    if matrix is not None:
        drawn["matrix"] = plots.heat_map(matrix)
        after = matrix.last_complete_row or 0
        if after and matrix.shift is not None:
            drawn["shift"] = plots.shift_map(matrix)
        if after:
            drawn["average"] = plots.seen_and_unseen(matrix)
            drawn["curves"] = plots.task_curves(matrix)
            if run.lenient is not None:
                drawn["form"] = plots.lenient_bars(matrix, run.lenient, after)
        if after > 1:
            drawn["forgetting"] = plots.forgetting_bars(matrix, after)
    if classes is not None and classes.confusion is not None:
        drawn["confusion"] = plots.confusion_map(classes.confusion.group(_MAX_CLASSES))
    if ledger is not None and len(ledger):
        drawn["cost"] = plots.cost_bars(ledger)
    return drawn


def _values(run: RunFiles, drawn: dict[str, bytes], classes: _Classes | None) -> dict[str, Any]:
    summary, matrix = run.summary, run.matrix
    metrics = _metrics(run)
    warnings = [*(summary.warnings if summary else ()), *run.notes]
    return {
        "name": summary.name if summary else run.folder.resolve().name,
        "facts": _facts(run),
        "state": _state(run),
        "is_finished": bool(summary and summary.finished),
        "warnings": warnings,
        "cards": [each for each in metrics if each.name in MAIN],
        "metrics": metrics,
        "plots": {
            name: {"title": title, "text": text, "svg": inline_svg(drawn[name], name, title)}
            for name, (title, text) in _CAPTIONS.items()
            if name in drawn
        },
        "scores": sorted({column.score for column in matrix.columns}) if matrix else [],
        "forms": _forms(run),
        "shift": _shift_metrics(run, metrics),
        "grid": _probe_grid(run),
        "recalls": [each for each in run.retrieval if each.after == run.retrieval[-1].after],
        "classes": _class_values(run, classes),
        "after": (matrix.last_complete_row or 0) if matrix else 0,
        "diagnostics": [_diagnostic(n, each) for n, each in enumerate(run.diagnostics)],
        "costs": list(run.ledger) if run.ledger else [],
        "total": run.ledger.total() if run.ledger else None,
        "samples": [_sample(sample) for sample in run.samples],
        "has_questions": any(sample.question for sample in run.samples),
        "errors": [
            each if isinstance(each, str) else " · ".join(each.values())
            for each in (summary.errors if summary else ())
        ],
        "config": run.config,
        "versions": summary.versions if summary else {},
        "hashes": summary.hashes if summary else {},
    }


def _metrics(run: RunFiles) -> list[MetricValue]:
    if run.summary is not None and run.summary.metrics:
        return list(run.summary.metrics)
    if run.matrix is None or run.matrix.last_row is None:
        return []
    after = run.matrix.last_complete_row or 0
    lenient = [] if run.lenient is None else compute_lenient_metrics(run.matrix, run.lenient, after)
    declared = compute_declared_metrics(run.matrix, run.lenient, after)
    return compute_all_metrics(run.matrix, after) + lenient + declared


def _shift_metrics(run: RunFiles, metrics: list[MetricValue]) -> list[MetricValue]:
    """Metrics shown below the map of a shift: the three of time, or transfer to each language."""
    kind = run.matrix.shift if run.matrix is not None else None
    if kind == "language":
        return [each for each in metrics if each.name.startswith("forward transfer of ")]
    return [each for each in metrics if each.name in TIME] if kind is not None else []


def _probe_grid(run: RunFiles) -> list[dict[str, Any]]:
    """Rows of the table of probes by stage, each cell with a shade of its absolute loss."""
    if run.matrix is None or run.matrix.last_row is None:
        return []
    return [
        {
            "title": end.title,
            "is_first": end.row == 0,
            "cells": [
                {"probe": column, "values": cell, "shade": _shade(cell.loss.value)}
                for column, cell in cells
            ],
        }
        for end, cells in probe_grid(run.matrix, run.lenient)
    ]


def _shade(loss: float | None) -> str:
    """Background of a loss, orange where something was lost, blue where it was gained."""
    if not loss:
        return "transparent"
    color = WARM if loss > 0 else ACCENT
    return f"{color}{round(255 * min(0.1 + abs(loss), 0.5)):02x}"


def _forms(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Rows of name, strict, lenient and difference: tasks, their mean, forgetting."""
    matrix, lenient = run.matrix, run.lenient
    after = matrix.last_complete_row if matrix is not None else None
    if matrix is None or lenient is None or not after:
        return []
    cells = [(matrix.get(after, task), lenient.get(after, task)) for task in range(after)]
    rows = [_form(name, *pair, "accuracy") for name, pair in zip(matrix.names, cells, strict=False)]
    known, lost, _ = compute_lenient_metrics(matrix, lenient, after)
    rows.append(_form("average", average_accuracy(matrix, after).value, known.value, "accuracy"))
    if lost.value is not None:
        rows.append(_form("forgetting", forgetting(matrix, after).value, lost.value, "forgetting"))
    return rows


def _class_values(run: RunFiles, classes: _Classes | None) -> dict[str, Any] | None:
    """Values of the section of classes: the table, at most 60 lines, and what to know about it."""
    if classes is None or run.matrix is None:
        return None
    matrix, metrics, confusion = run.matrix, classes.metrics, classes.confusion
    shown, notes = metrics, [classes.note] if classes.note else []
    if len(metrics) > _MAX_CLASSES:
        shown = sorted(metrics, key=_loss)[:_MAX_CLASSES]
        notes.append(
            f"{_MAX_CLASSES} of {len(metrics):,} classes are shown, those that lost most; "
            f"all are in {CLASSES}."
        )
    if confusion is not None and len(confusion.classes) > _MAX_CSV_CLASSES:
        notes.append(f"{CONFUSION} is left out: it is written for up to {_MAX_CSV_CLASSES:,}.")
    others = [
        column.name
        for column in matrix.columns[: classes.after]
        if column.task_type != "classification"
    ]
    if others:
        notes.append(f"Tasks without classes are left out: {', '.join(others)}.")
    return {
        "after": classes.after,
        "task": matrix.rows[classes.after],
        "notes": notes,
        "is_grouped": confusion is not None and len(confusion.classes) > _MAX_CLASSES,
        "has_frames": confusion is not None and bool(confusion.group(_MAX_CLASSES).blocks),
        "shown": shown,
    }


def _diagnostic(number: int, record: Diagnostic) -> dict[str, Any]:
    svg = draw_diagnostic(record)
    return {"record": record, "svg": inline_svg(svg, f"diagnostic-{number}", record.title)}


def _loss(of: ClassMetrics) -> tuple[bool, float, float]:
    """Sort key: most forgotten first, undefined last, then least accurate first."""
    lost, final = of.forgetting.value, of.final.value
    return lost is None, -(lost or 0.0), 1.0 if final is None else final


def _form(
    name: str, strict: float | None, lenient: float | None, kind: str
) -> tuple[str, str, str, str]:
    shown = [
        UNMEASURED if value is None else format_metric(kind, value) for value in (strict, lenient)
    ]
    if strict is None or lenient is None:
        return name, shown[0], shown[1], UNMEASURED
    change = strict - lenient if kind == "forgetting" else lenient - strict
    return name, shown[0], shown[1], f"{100 * change:+.1f}"


def _facts(run: RunFiles) -> list[tuple[str, str]]:
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


def _state(run: RunFiles) -> str:
    if run.summary is not None and run.summary.finished:
        return "finished"
    if run.matrix is None or run.matrix.last_complete_row is None:
        return "no task learned yet"
    return f"after task {run.matrix.last_complete_row} of {run.matrix.tasks}"


def _sample(sample: SamplePredictions) -> dict[str, Any]:
    image = base64.b64encode(sample.image_png).decode("ascii")
    source = f"data:image/png;base64,{image}" if image else ""
    right = sample.right_answers
    return {
        "sample": sample,
        "source": source,
        "right": right[:_MAX_RIGHT],
        "more": len(right) - _MAX_RIGHT,
        "predictions": {
            row: {"prediction": each, "mark": _mark(each)}
            for row, each in sample.predictions.items()
        },
    }


def _mark(prediction: Prediction) -> dict[str, str]:
    """Mark of a prediction: right, right in another form, or wrong; its score if fractional."""
    score = "" if prediction.strict in (None, 0.0, 1.0) else percent(prediction.strict or 0.0)
    if prediction.correct:
        return {"sign": "✓", "kind": "right", "title": "right", "score": score}
    if (prediction.lenient or 0.0) >= RIGHT_FROM:
        title = "right, but not in the requested form"
        return {"sign": "≈", "kind": "near", "title": title, "score": score}
    return {"sign": "✗", "kind": "wrong", "title": "wrong", "score": score}
