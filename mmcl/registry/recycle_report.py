"""Report of a recycling: recycle.json, recycle.md with a table, and recycle.svg and .png."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mmcl.core import write_atomic
from mmcl.evaluation import strict_json
from mmcl.registry.learning_curve import LearningCurve
from mmcl.registry.recycle import Recycled
from mmcl.report.plot_style import ACCENT, MUTED, WARM, canvas, render, tidy

JSON, TABLE, FIGURE = "recycle.json", "recycle.md", "recycle"
Row = tuple[str, str, str, str, str]
HEADER: Row = ("run", "final score", "steps to target", "steps", "training FLOPs")


def write_recycle_report(result: Recycled, folder: Path) -> list[Path]:
    """Write result, table and, after training, the figure; return their paths."""
    target = result.scores.old
    curves = {"recycled": result.recycled, "scratch": result.scratch}
    data = asdict(result) | {
        "target": target,
        "steps_to_target": {n: c.steps_to(target) for n, c in curves.items() if c is not None},
        "final_score": {n: c.last_score for n, c in curves.items() if c is not None},
    }
    write_atomic(folder / JSON, strict_json.to_bytes(data))
    write_atomic(folder / TABLE, _markdown(result))
    written = [folder / JSON, folder / TABLE]
    if result.recycled is not None:
        for form in ("svg", "png"):
            file = folder / f"{FIGURE}.{form}"
            write_atomic(file, _figure(result, form))
            written.append(file)
    return written


def table_rows(result: Recycled) -> list[Row]:
    """Return the rows of the table, scores in percent; a dash is what was not measured."""
    scores, target = result.scores, result.scores.old
    rows: list[Row] = [
        ("old base and adapter (target)", percent(scores.old), "-", "-", "-"),
        ("next base alone", percent(scores.bare), "-", "0", "0"),
        ("next base and adapter (direct)", percent(scores.direct), "-", "0", "0"),
    ]
    named = {
        f"recycled ({result.options.mode})": result.recycled,
        "from the next base alone": result.scratch,
    }
    for name, curve in named.items():
        if curve is not None:
            reached = curve.steps_to(target)
            steps = "not reached" if reached is None else str(reached)
            rows.append(
                (name, percent(curve.last_score), steps, str(curve.steps), f"{curve.flops:.3g}")
            )
    return rows


def percent(score: float | None) -> str:
    """Return a score of 0 to 1 in percent, "-" for None."""
    return "-" if score is None else f"{100 * score:.1f}"


def _markdown(result: Recycled) -> str:
    rows = [HEADER, ("---",) * len(HEADER), *table_rows(result)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    fits = [f"- {c.what}: {'ok' if c.fits else 'differs'} ({c.detail})" for c in result.checks]
    few = result.few_shot
    title = f"# {result.options.adapter} on {result.options.base}"
    data = "No data: nothing was measured."
    if few is not None:
        data = (
            f"Task '{few.task}': {few.samples} training samples, measured on {few.test_samples} "
            f"test samples, seed {few.seed}."
        )
    return "\n".join([title, "", data, "", *lines, "", *fits, ""])


def _figure(result: Recycled, form: str) -> bytes:
    """Draw the scores of both runs over the training FLOPs, and the target."""
    figure, axes = canvas(6.4, 3.4)
    curves = {
        f"recycled ({result.options.mode})": (result.recycled, ACCENT),
        "from the next base alone": (result.scratch, WARM),
    }
    for name, (curve, color) in curves.items():
        if curve is not None:
            _draw(axes, curve, name, color)
    if result.scores.old is not None:
        axes.axhline(
            100 * result.scores.old,
            color=MUTED,
            linestyle="--",
            linewidth=1,
            label="old base and adapter",
        )
    axes.set_xlabel("training operations (FLOPs)")
    axes.set_ylabel("score, %")
    axes.set_ylim(0, 104)
    axes.legend(loc="best", frameon=False, fontsize=8.5)
    tidy(axes)
    return render(figure, "recycle", "svg" if form == "svg" else "png")


def _draw(axes: object, curve: LearningCurve, name: str, color: str) -> None:
    known = [(p.step, 100 * p.score) for p in curve.points if p.score is not None]
    unit = curve.flops / max(1, curve.steps)
    places = [unit * step for step, _ in known]
    axes.plot(  # type: ignore[attr-defined]
        places, [value for _, value in known], color=color, label=name, marker="o", markersize=3
    )
