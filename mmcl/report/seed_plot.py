"""Plot of a comparison over seeds: curves with a band, bars with a whisker, a dot per seed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from mmcl.report.formatting import shorten, unit
from mmcl.report.plot_style import (
    INK,
    LINE,
    MUTED,
    canvas,
    name_ticks,
    render,
    series_color,
    style,
    tidy,
    write_text,
)

Values = tuple[float, ...]
Curve = Sequence[Values]


def plot_seeds(
    curves: Sequence[tuple[str, Curve]],
    bars: Mapping[str, Sequence[Values]],
    rows: Sequence[str],
) -> bytes:
    """Draw groups of runs: above, average accuracy over training; below, one panel per metric.

    Args:
        curves: label of each group and, per row, the values of its seeds.
        bars: metric name -> per group the values of its seeds; empty values draw nothing.
        rows: names of the rows of the curves.

    Returns:
        PNG bytes; bands and whiskers are one sample standard deviation to either side.
    """
    count = len(curves)
    height = 0.75 + 0.26 * count
    figure, _ = canvas(10.5, 3.9 + 2 * height, 0)
    with style():
        halves: Any = figure.subfigures(2, 1, height_ratios=[3.9, 2 * height])
        upper, lower = halves
        upper.set_facecolor("none")
        lower.set_facecolor("none")
        _draw_curves(upper.subplots(1, 1), curves, rows)
        across = (len(bars) + 1) // 2
        panels = list(lower.subplots(2, across, squeeze=False).flat)
        for unused in panels[len(bars) :]:
            unused.remove()
        for n, (axes, name) in enumerate(zip(panels, bars, strict=False)):
            labels = [label for label, _ in curves] if n % across == 0 else []
            _draw_bars(axes, name, bars[name], labels)
    return render(figure, "comparison", "png")


def _draw_curves(axes: Axes, curves: Sequence[tuple[str, Curve]], rows: Sequence[str]) -> None:
    for n, (label, curve) in enumerate(curves):
        color = series_color(n, len(curves))
        points = [(row, values) for row, values in enumerate(curve) if values]
        at = [row for row, _ in points]
        means = [100 * statistics.fmean(values) for _, values in points]
        spans = [100 * _deviation(values) for _, values in points]
        (line,) = axes.plot(at, means, "o-", color=color, linewidth=1.8, markersize=4)
        line.set_label(shorten(label, 48))
        low = [mean - span for mean, span in zip(means, spans, strict=True)]
        high = [mean + span for mean, span in zip(means, spans, strict=True)]
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    step = max(1, len(rows) // 12)
    name_ticks(axes.xaxis, range(0, len(rows), step), [shorten(row, 12) for row in rows[::step]])
    axes.set_title("average accuracy after each task, %", color=MUTED, fontsize=9, loc="left")
    tidy(axes)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    for text in legend.get_texts():
        write_text(text, text.get_text(), color=INK)


def _draw_bars(axes: Axes, name: str, groups: Sequence[Values], labels: Sequence[str]) -> None:
    for n, values in enumerate(groups):
        if not values:
            axes.text(0, n, " ·", color=MUTED, va="center")
            continue
        mean, span = 100 * statistics.fmean(values), 100 * _deviation(values)
        color = series_color(n, len(groups))
        axes.barh(n, mean, color=color, alpha=0.55, height=0.62)
        axes.errorbar(mean, n, xerr=span, color=INK, linewidth=1.2, capsize=2.5)
        seeds = [100 * value for value in values]
        axes.plot(seeds, [n] * len(seeds), "o", color=color, markersize=3.2)
    names = [shorten(label, 24) for label in labels] or [""] * len(groups)
    name_ticks(axes.yaxis, range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    tidy(axes, "x")
    axes.axvline(0, color=LINE, linewidth=1)
    axes.set_title(f"{name}, {unit(name)}", color=MUTED, fontsize=9, loc="left")


def _deviation(values: Values) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
