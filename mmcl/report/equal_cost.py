"""Comparison of runs at equal cost: each run's scores when it had cost as much as the cheapest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation.cost import Ledger, TaskCost
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.run_files import LEDGER, MATRIX
from mmcl.report.formatting import sanitize, shorten
from mmcl.report.plot_style import INK, MUTED, canvas, color_legend, series_color, tidy
from mmcl.report.plot_style import render as render_plot
from mmcl.report.tables import csv_text, render

COSTS: dict[str, tuple[str, Callable[[TaskCost], float | None]]] = {
    "samples": ("training samples", lambda cost: cost.samples_new + cost.samples_replayed),
    "flops": ("FLOPs of training", lambda cost: cost.flops),
    "memory_adjusted_flops": ("FLOPs x GiB of peak memory", lambda c: c.memory_adjusted_flops),
    "seconds": ("seconds of training", lambda cost: cost.seconds),
    "bytes": ("bytes that the strategy keeps", lambda cost: cost.state_bytes),
}
"""Kind of cost -> its words, and its value for a task; of bytes the largest counts, not the sum."""


@dataclass(frozen=True)
class CostCurve:
    """Scores of a run over its cost.

    Args:
        label: name of the run.
        costs: cost of training until each measured row, ascending; 0 before training.
        scores: mean score over all tasks of the stream in these rows, learned or not.
        tasks: learned tasks in these rows.
    """

    label: str
    costs: tuple[float, ...]
    scores: tuple[float, ...]
    tasks: tuple[int, ...]

    def at(self, budget: float) -> int:
        """Return the index of the last row within a budget; row 0 costs nothing."""
        return max(n for n, cost in enumerate(self.costs) if cost <= budget)


@dataclass(frozen=True)
class EqualCost:
    """Runs of one stream at equal cost.

    Args:
        kind: of the cost, a key of ``COSTS``.
        budget: the cost at which they are compared.
        curves: of the runs, best score at that cost first.
        notes: what was left out, a sentence each.
    """

    kind: str
    budget: float
    curves: tuple[CostCurve, ...]
    notes: tuple[str, ...] = ()

    def text(self, width: int = 100) -> str:
        """Format the table for a terminal."""
        words = COSTS[self.kind][0]
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        for name in ("run", "score, %", "tasks learned", words):
            table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
        for curve in self.curves:
            at = curve.at(self.budget)
            table.add_row(
                Text(sanitize(curve.label)), f"{100 * curve.scores[at]:.1f}", str(curve.tasks[at]),
                f"{curve.costs[at]:,.4g}",
            )  # fmt: skip
        head = (
            f"at {self.budget:,.4g} {words} or less; the score is the mean over all tasks of the "
            "stream, learned or not"
        )
        return "\n".join([head, render([table], width, False), *map(sanitize, self.notes)])

    def csv(self) -> str:
        """Write every row of every run as CSV."""
        rows: list[list[str | float | None]] = [
            [curve.label, tasks, cost, score]
            for curve in self.curves
            for tasks, cost, score in zip(curve.tasks, curve.costs, curve.scores, strict=True)
        ]
        return csv_text(["run", "tasks learned", self.kind, "score"], rows)

    def figure(self) -> bytes:
        """Draw score over cost, a line for each run, as PNG."""
        figure, axes = canvas(8.5, 3.6)
        for n, curve in enumerate(self.curves):
            color = series_color(n, len(self.curves))
            scores = [100 * score for score in curve.scores]
            (line,) = axes.plot(curve.costs, scores, "o-", color=color, linewidth=1.8, markersize=4)
            line.set_label(shorten(curve.label, 40))
        axes.axvline(self.budget, color=INK, linewidth=1, linestyle=":")
        axes.set_title("mean score over all tasks, %", color=MUTED, fontsize=9, loc="left")
        axes.set_xlabel(COSTS[self.kind][0])
        tidy(axes)
        legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        color_legend(legend)
        return render_plot(figure, "equal_cost", "png")

    def write(self, folder: Path) -> None:
        """Write equal_<kind>.csv and .png."""
        write_atomic(folder / f"equal_{self.kind}.csv", self.csv().encode("utf-8", "replace"))
        write_atomic(folder / f"equal_{self.kind}.png", self.figure())


def compare_at_equal(runs: Sequence[Path], kind: str, budget: float | None = None) -> EqualCost:
    """Compare runs of one stream, finished or not, at equal cost.

    Args:
        runs: run directories.
        kind: of the cost, a key of ``COSTS``.
        budget: the cost; None = that of the cheapest run.

    Raises:
        FileNotFoundError: if a run lacks matrix.json or ledger.json.
        ValueError: if the runs are of other streams, or the kind was not measured.
    """
    if kind not in COSTS:
        raise ValueError(f"at_equal is {kind!r}: give one of {', '.join(COSTS)}")
    curves, notes, first = [], [], None
    for folder in runs:
        matrix = AccuracyMatrix.read(folder / MATRIX)
        tasks = matrix.columns[: matrix.tasks]
        first = tasks if first is None else first
        if tasks != first:
            raise ValueError(
                f"{folder} is of other tasks than {runs[0]}: compare runs of one stream"
            )
        curve = _curve(folder, matrix, kind)
        curves.append(curve)
        if curve.tasks[-1] < matrix.tasks:
            notes.append(f"{folder} has learned {curve.tasks[-1]} of {matrix.tasks} tasks")
    budget = min(curve.costs[-1] for curve in curves) if budget is None else budget
    curves.sort(key=lambda curve: -curve.scores[curve.at(budget)])
    return EqualCost(kind, budget, tuple(curves), tuple(notes))


def _curve(folder: Path, matrix: AccuracyMatrix, kind: str) -> CostCurve:
    """Return the curve of a run over its completely measured rows."""
    words, value = COSTS[kind]
    costs, spent = [0.0], 0.0
    for cost in Ledger.read(folder / LEDGER):
        found = value(cost)
        if found is None:
            raise ValueError(
                f"{folder} has no {words} for task '{cost.task}' (a strategy in closed form takes "
                "no steps): compare at equal samples, seconds or bytes"
            )
        spent = max(spent, found) if kind == "bytes" else spent + found
        costs.append(spent)
    rows = []
    for row, spent in enumerate(costs[: len(matrix.rows)]):
        scores = matrix.values[row][: matrix.tasks]
        known = [score for score in scores if score is not None]
        if len(known) == len(scores):
            rows.append((spent, fmean(known), row))
    if not rows or rows[0][2] != 0:
        raise ValueError(
            f"{folder} has no complete row before training, which costs nothing: evaluate it, or "
            "leave the run out"
        )
    return CostCurve(folder.name, *map(tuple, zip(*rows, strict=True)))
