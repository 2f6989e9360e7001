"""Comparison of runs: mean and deviation over seeds, as table, plot, CSV and LaTeX."""

from __future__ import annotations

import base64
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.table import Table
from rich.text import Text

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation.continual_metrics import LENIENT_MAIN, MAIN, average_accuracy
from mmcl.evaluation.declared_metrics import declared_names
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.run_files import MATRIX, SUMMARY, RunSummary
from mmcl.report.formatting import format_metric, sanitize, shorten, unit
from mmcl.report.html import render_template
from mmcl.report.plot_style import (
    INK,
    LINE,
    MUTED,
    canvas,
    color_legend,
    name_bars,
    name_ticks,
    series_color,
    style,
    tidy,
)
from mmcl.report.plot_style import render as render_plot
from mmcl.report.tables import UNMEASURED, csv_text, latex, latex_table, render

_SEED_AT_END = re.compile(r"[-_.]?(?:seed|s)[-_=]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class SeedStats:
    """Metric over the seeds of a group.

    Args:
        name: of the metric.
        values: one per seed, in the order of the seeds; empty if a seed has none.
        reason: why there are no values.
    """

    name: str
    values: tuple[float, ...]
    reason: str | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (divisor n - 1), None below two seeds."""
        return _deviation(self.values) if len(self.values) > 1 else None

    @property
    def text(self) -> str:
        """Mean and deviation as text, a dot without values."""
        if self.mean is None:
            return UNMEASURED
        if self.deviation is None:
            return format_metric(self.name, self.mean)
        return f"{format_metric(self.name, self.mean)} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed.

    Args:
        label: strategy, and model and name where several groups share it.
        seeds: of the runs, ascending.
        stats: one per compared metric.
        curve: per row from 1, average accuracy of each seed; empty where a seed has none.
    """

    label: str
    seeds: tuple[int, ...]
    stats: tuple[SeedStats, ...]
    curve: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """Comparison of groups of runs over one stream.

    Args:
        stream: its name.
        scenario: task, class or domain.
        groups: best average accuracy first.
        rows: names of the matrix rows from 1.
        notes: what was left out, a sentence each.
    """

    stream: str
    scenario: str
    groups: tuple[Group, ...]
    rows: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the compared metrics: the main ones, then those that some runs have."""
        return tuple(stat.name for stat in self.groups[0].stats)

    def text(self, width: int = 100, *, is_colored: bool = False) -> str:
        """Format the table for a terminal of 100 characters, 12 more per metric beyond MAIN."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(
            f"{sanitize(self.stream)} ({self.scenario})", overflow="fold", vertical="bottom"
        )
        table.add_column("seeds", justify="right")
        for name in self.names:
            head = f"{name}, {unit(name)}".replace(" ", "\n")
            table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
        for group in self.groups:
            cells = [Text(stat.text) for stat in group.stats]
            table.add_row(Text(sanitize(group.label)), str(len(group.seeds)), *cells)
        least = 100 + 12 * (len(self.names) - len(MAIN))
        return "\n".join(
            [render([table], max(width, least), is_colored), *map(sanitize, self.notes)]
        )

    def csv(self) -> str:
        """Write mean and deviation of every metric as CSV, with all digits."""
        head = [f"{name} {what}" for name in self.names for what in ("mean", "deviation")]
        rows: list[list[str | float | None]] = []
        for group in self.groups:
            numbers = (n for stat in group.stats for n in (stat.mean, stat.deviation))
            rows.append([group.label, len(group.seeds), *numbers])
        return csv_text(["run", "seeds", *head], rows)

    def latex(self) -> str:
        """Write the table as a LaTeX ``tabular`` (needs booktabs)."""
        rows = [[latex(group.label), *map(_latex_cell, group.stats)] for group in self.groups]
        return latex_table(["Run", *self.names], rows)

    def figure(self) -> bytes:
        """Draw average accuracy over training, and below it one panel per metric, as PNG.

        A dot is a seed; bands and whiskers are one sample standard deviation to either side.
        """
        height = 0.75 + 0.26 * len(self.groups)
        figure, _ = canvas(10.5, 3.9 + 2 * height, 0)
        with style():
            halves: Any = figure.subfigures(2, 1, height_ratios=[3.9, 2 * height])
            upper, lower = halves
            upper.set_facecolor("none")
            lower.set_facecolor("none")
            _draw_curves(upper.subplots(1, 1), self.groups, self.rows)
            across = (len(self.names) + 1) // 2
            panels = list(lower.subplots(2, across, squeeze=False).flat)
            for unused in panels[len(self.names) :]:
                unused.remove()
            for n, axes in enumerate(panels[: len(self.names)]):
                _draw_bars(axes, self.groups, n, has_labels=n % across == 0)
        return render_plot(figure, "comparison", "png")

    def write(self, folder: Path) -> Path:
        """Write the comparison as comparison.html, .png, .csv and .tex.

        Returns:
            path of the page.
        """
        png = self.figure()
        source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
        values = {"comparison": self, "names": self.names, "source": source}
        write_atomic(folder / "comparison.png", png)
        write_atomic(folder / "comparison.csv", self.csv().encode("utf-8", "replace"))
        write_atomic(folder / "comparison.tex", self.latex().encode("utf-8", "replace"))
        page = folder / "comparison.html"
        write_atomic(page, render_template("compare.html.j2", values))
        return page


@dataclass(frozen=True)
class _Run:
    folder: Path
    summary: RunSummary
    matrix: AccuracyMatrix


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare finished runs of one stream, grouped over seeds.

    Runs are one group if strategy, model and name are equal, the name without a seed at its end
    (``er-seed3``, ``er_s3``, or ``er-3`` where 3 is the run's seed). Unfinished runs are left out
    and named in the notes.

    Args:
        runs: run directories.

    Raises:
        FileNotFoundError: if a run lacks summary.json or matrix.json.
        ValueError: if the streams differ, no run is finished, or a group has a seed twice.
    """
    read = [
        _Run(folder, RunSummary.read(folder / SUMMARY), AccuracyMatrix.read(folder / MATRIX))
        for folder in runs
    ]
    finished = [run for run in read if run.summary.finished]
    if not finished:
        raise ValueError(f"compare got {len(read)} runs, none finished: give one that is")
    for run in finished[1:]:
        _refuse_other_stream(finished[0], run)
    together: dict[tuple[str, str, str], list[_Run]] = {}
    for run in finished:
        key = (run.summary.strategy, run.summary.model, _stem(run.summary))
        together.setdefault(key, []).append(run)
    labels = _labels(list(together))
    has_forms = any(run.summary.metric(LENIENT_MAIN) for run in finished)
    names: tuple[str, ...] = (*MAIN, LENIENT_MAIN) if has_forms else MAIN
    names += tuple(dict.fromkeys(name for run in finished for name in declared_names(run.matrix)))
    groups = [
        _group(label, members, names)
        for label, members in zip(labels, together.values(), strict=True)
    ]
    groups.sort(key=lambda group: -(group.stats[0].mean or 0.0))
    first = finished[0].matrix
    left_out = [run for run in read if not run.summary.finished]
    notes = [f"left out, not finished: {run.folder}" for run in left_out]
    return Comparison(first.stream, first.scenario, tuple(groups), first.rows[1:], tuple(notes))


def _refuse_other_stream(first: _Run, other: _Run) -> None:
    for what in ("stream", "scenario", "tasks", "columns"):
        mine, theirs = getattr(first.matrix, what), getattr(other.matrix, what)
        if mine == theirs:
            continue
        if what == "columns":
            pairs = zip(mine, theirs, strict=False)
            mine, theirs = next((p for p in pairs if p[0] != p[1]), (len(mine), len(theirs)))
        raise ValueError(
            f"runs differ in {what}: {first.folder} has {mine!r}, {other.folder} has {theirs!r}; "
            f"compare runs of one stream"
        )


def _stem(summary: RunSummary) -> str:
    cut = _SEED_AT_END.sub("", summary.name)
    if cut == summary.name:
        cut = re.sub(rf"[-_.]{summary.seed}$", "", summary.name)
    return cut or summary.name


def _labels(keys: list[tuple[str, str, str]]) -> list[str]:
    """Label groups by strategy, and by model and name as far as that makes labels distinct."""
    shown = [0]
    for n in (1, 2):
        distinct = {tuple(key[each] for each in shown) for key in keys}
        varies = len({key[n] for key in keys}) > 1
        if varies and len(distinct) < len(keys):
            shown.append(n)
    return [" · ".join(key[n] for n in shown) for key in keys]


def _group(label: str, members: list[_Run], names: Sequence[str]) -> Group:
    members.sort(key=lambda run: run.summary.seed)
    for one, two in zip(members, members[1:], strict=False):
        if one.summary.seed == two.summary.seed:
            raise ValueError(
                f"{one.folder} and {two.folder} are both {label!r} with seed {one.summary.seed}: "
                f"give one of them, or runs of other seeds"
            )
    seeds = tuple(run.summary.seed for run in members)
    stats = tuple(_seed_stats(name, members) for name in names)
    return Group(label, seeds, stats, _curve(members))


def _seed_stats(name: str, members: list[_Run]) -> SeedStats:
    metrics = [run.summary.metric(name) for run in members]
    values = [each.value for each in metrics if each and each.value is not None]
    if len(values) == len(members):
        return SeedStats(name, tuple(values))
    reasons = [each.reason for each in metrics if each and each.reason]
    return SeedStats(name, (), reasons[0] if reasons else f"a run has no metric {name!r}")


def _curve(members: list[_Run]) -> tuple[tuple[float, ...], ...]:
    curve: list[tuple[float, ...]] = []
    for row in range(1, members[0].matrix.tasks + 1):
        values = [average_accuracy(run.matrix, row).value for run in members]
        known = [value for value in values if value is not None]
        curve.append(tuple(known) if len(known) == len(values) else ())
    return tuple(curve)


def _latex_cell(stat: SeedStats) -> str:
    return "--" if stat.mean is None else f"${stat.text.replace('±', chr(92) + 'pm')}$"


def _draw_curves(axes: Axes, groups: Sequence[Group], rows: Sequence[str]) -> None:
    for n, group in enumerate(groups):
        color = series_color(n, len(groups))
        points = [(row, values) for row, values in enumerate(group.curve) if values]
        at = [row for row, _ in points]
        means = [100 * statistics.fmean(values) for _, values in points]
        spans = [100 * _deviation(values) for _, values in points]
        (line,) = axes.plot(at, means, "o-", color=color, linewidth=1.8, markersize=4)
        line.set_label(shorten(group.label, 48))
        low = [mean - span for mean, span in zip(means, spans, strict=True)]
        high = [mean + span for mean, span in zip(means, spans, strict=True)]
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    step = max(1, len(rows) // 12)
    name_ticks(axes.xaxis, range(0, len(rows), step), [shorten(row, 12) for row in rows[::step]])
    axes.set_title("average accuracy after each task, %", color=MUTED, fontsize=9, loc="left")
    tidy(axes)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    color_legend(legend)


def _draw_bars(axes: Axes, groups: Sequence[Group], metric: int, *, has_labels: bool) -> None:
    for n, group in enumerate(groups):
        values = group.stats[metric].values
        if not values:
            axes.text(0, n, " ·", color=MUTED, va="center")
            continue
        mean, span = 100 * statistics.fmean(values), 100 * _deviation(values)
        color = series_color(n, len(groups))
        axes.barh(n, mean, color=color, alpha=0.55, height=0.62)
        axes.errorbar(mean, n, xerr=span, color=INK, linewidth=1.2, capsize=2.5)
        seeds = [100 * value for value in values]
        axes.plot(seeds, [n] * len(seeds), "o", color=color, markersize=3.2)
    name_bars(axes, [shorten(group.label, 24) if has_labels else "" for group in groups])
    axes.axvline(0, color=LINE, linewidth=1)
    name = groups[0].stats[metric].name
    axes.set_title(f"{name}, {unit(name)}", color=MUTED, fontsize=9, loc="left")


def _deviation(values: tuple[float, ...]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
