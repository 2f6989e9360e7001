"""Diagnostics for people: the figure, the text table and the csv table of a record."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from mmcl.evaluation.diagnostic_record import Diagnostic, Panel
from mmcl.report.formatting import percent, sanitize, shorten
from mmcl.report.plot_style import (
    ACCENT,
    LINE,
    MUTED,
    WARM,
    Format,
    canvas,
    color_legend,
    label_points,
    name_ticks,
    render,
    series_color,
    tidy,
    write_text,
)

_PANEL_WIDTH, _PANEL_HEIGHT = 5.2, 3.4
_MAX_LEGEND = 10
_MAX_TICKS = 12
_MAX_POINT_LABELS = 21


def draw_diagnostic(diagnostic: Diagnostic, format: Format = "svg") -> bytes:
    """Draw the panels of a diagnostic side by side, one line per series, gaps where undefined."""
    count = len(diagnostic.panels)
    figure, axes = canvas(_PANEL_WIDTH * count + 0.6, _PANEL_HEIGHT, count)
    for each, panel in zip([axes] if count == 1 else axes, diagnostic.panels, strict=True):
        _draw_panel(each, diagnostic, panel)
    return render(figure, f"diagnostic-{diagnostic.name}", format)


def _draw_panel(axes: Axes, diagnostic: Diagnostic, panel: Panel) -> None:
    scale = 100 if panel.is_score else 1
    count = len(panel.series)
    for index, series in enumerate(panel.series):
        values = [float("nan") if v is None else scale * v for v in series.values]
        axes.plot(
            list(diagnostic.x_values), values, "o-", color=series_color(index, count),
            linewidth=1.8 if count <= _MAX_LEGEND else 0.9, markersize=3.5,
            label=shorten(series.name, 22) if _is_named(index, count) else "_",
        )  # fmt: skip
    if diagnostic.x_names:
        step = -(-len(diagnostic.x_names) // _MAX_TICKS)
        names = [shorten(name, 14) for name in diagnostic.x_names[::step]]
        turn = {"rotation": 30, "ha": "right"}
        name_ticks(axes.xaxis, list(diagnostic.x_values)[::step], names, **turn)
    elif all(value == round(value) for value in diagnostic.x_values):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    write_text(axes.set_xlabel(" "), diagnostic.x_label, color=MUTED)
    title = f"{panel.title}, %" if panel.is_score else panel.title
    write_text(axes.set_title(" ", loc="left"), title, color=MUTED, fontsize=9)
    tidy(axes)
    if panel.series:
        legend = axes.legend(
            loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=8,
            handlelength=1.2,
        )  # fmt: skip
        color_legend(legend)


def _is_named(index: int, count: int) -> bool:
    """Whether a series is in the legend: all of a few, the first and the last of many."""
    return count <= _MAX_LEGEND or index in (0, count - 1)


def diagnostic_csv(diagnostic: Diagnostic) -> bytes:
    """Return the values of a diagnostic as csv: a line per point, undefined cells empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_header(diagnostic))
    points = list(diagnostic.x_names) or list(map(repr, diagnostic.x_values))
    for index, name in enumerate(points):
        row = [series.values[index] for panel in diagnostic.panels for series in panel.series]
        writer.writerow([name, *("" if value is None else repr(value) for value in row)])
    return text.getvalue().encode("utf-8", "replace")


def diagnostic_table(diagnostic: Diagnostic, max_columns: int = 8) -> str:
    """Return a diagnostic as text: a table per panel, its metrics, and what was left out.

    Args:
        diagnostic: the record.
        max_columns: series that are shown of each panel; all are in the csv file.
    """
    lines = [sanitize(diagnostic.title)]
    for panel in diagnostic.panels:
        title = f"{panel.title}, %" if panel.is_score else panel.title
        lines += [sanitize(f"  {title}"), *_aligned(_panel_rows(diagnostic, panel, max_columns))]
        if len(panel.series) > max_columns:
            lines.append(f"{len(panel.series) - max_columns} more columns are in the csv file")
    for metric in diagnostic.metrics:
        value = f"undefined: {metric.reason}" if metric.value is None else f"{metric.value:.4g}"
        lines.append(sanitize(f"{metric.name}: {value}"))
    return "\n".join([*lines, *(sanitize(note) for note in diagnostic.notes)])


def _panel_rows(diagnostic: Diagnostic, panel: Panel, max_columns: int) -> list[list[str]]:
    scale, shown = (100 if panel.is_score else 1), panel.series[:max_columns]
    rows = [[diagnostic.x_label, *(series.name for series in shown)]]
    for index, name in enumerate(_points(diagnostic)):
        values = [series.values[index] for series in shown]
        rows.append([name, *("-" if v is None else f"{scale * v:.4g}" for v in values)])
    return rows


def _header(diagnostic: Diagnostic) -> list[str]:
    names = [
        f"{panel.title}, {series.name}" if series.name != panel.title else panel.title
        for panel in diagnostic.panels
        for series in panel.series
    ]
    return [diagnostic.x_label, *names]


def _points(diagnostic: Diagnostic) -> list[str]:
    return list(diagnostic.x_names) or [f"{value:.4g}" for value in diagnostic.x_values]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[sanitize(shorten(cell, 28)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]


class AbilityPoint(Protocol):
    """Point of a trade-off between old and new ability, 0 to 1."""

    @property
    def value(self) -> float:
        """Value of the setting."""

    @property
    def old(self) -> float:
        """Mean score of old tasks."""

    @property
    def new(self) -> float:
        """Mean score of new tasks."""

    @property
    def mean(self) -> float:
        """Mean of both."""


def trade_off_table(option: str, points: Sequence[AbilityPoint], best: int) -> str:
    """Return a trade-off as a markdown table in percent, the best value marked.

    Args:
        option: name of the setting.
        points: one a value.
        best: index of the best one.
    """
    rows = [[option, "old, %", "new, %", "mean, %", ""]]
    for index, point in enumerate(points):
        scores = map(percent, (point.old, point.new, point.mean))
        rows.append([f"{point.value:g}", *scores, "best" if index == best else ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.rjust, row, widths)) for row in rows]
    rule = " | ".join("-" * (width - 1) + ":" for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def draw_trade_off(
    option: str, points: Sequence[AbilityPoint], best: int, format: Format = "svg"
) -> bytes:
    """Draw new ability against old ability, one labelled point a value, the best one ringed.

    Values with the same scores share a point and a label. Of more than 21 places only some are
    labelled, the ends and the best among them.

    Args:
        option: name of the setting.
        points: one a value, in their order.
        best: index of the best one.
        format: svg or png.
    """
    figure, axes = canvas(5.6, 4.4)
    places = [(100 * point.old, 100 * point.new) for point in points]
    x, y = zip(*places, strict=True)
    axes.plot(x, y, "-", color=LINE, linewidth=1.4, zorder=1)
    axes.plot(x, y, "o", color=ACCENT, markersize=4.5, zorder=2)
    axes.plot(
        *places[best], "o", color=WARM, markersize=11, fillstyle="none", markeredgewidth=1.6,
        label=f"best mean: {option} {points[best].value:g}", zorder=3,
    )  # fmt: skip
    axes.margins(0.12)
    write_text(axes.set_xlabel(" "), "old ability, %", color=MUTED)
    write_text(axes.set_ylabel(" "), "new ability, %", color=MUTED)
    write_text(axes.set_title(" ", loc="left"), f"points: {option}", color=MUTED, fontsize=9)
    tidy(axes)
    axes.grid(axis="x", color=LINE, linewidth=0.7)
    color_legend(
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    )
    values_at: dict[tuple[float, float], list[str]] = {}
    for place, point in zip(places, points, strict=True):
        values_at.setdefault(place, []).append(f"{point.value:g}")
    step = -(-len(values_at) // _MAX_POINT_LABELS)
    named = [
        (place, shorten(", ".join(values), 24))
        for index, (place, values) in enumerate(values_at.items())
        if index % step == 0 or place in (places[best], places[-1])
    ]
    figure.draw_without_rendering()  # the layout decides where labels would overlap
    label_points(axes, places, named)
    return render(figure, f"trade-off-{option}", format)
