"""Plot style: colors, canvas, labels, and rendering to the same bytes each time."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from mmcl.report.formatting import sanitize

Format = Literal["svg", "png"]

INK = "#1f2430"
MUTED = "#6b7280"
LINE = "#d9dde5"
PAPER = "#fefefe"
ACCENT = "#0b62b4"
WARM = "#d55e00"
GOOD = "#009e73"
# Palette of Okabe and Ito, safe for common color blindness; yellow is left out.
SERIES = ("#0b72b2", "#d55e00", "#009e73", "#b5589a", "#b07d00", "#3c9fd6", "#7a6cc9")

_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.unicode_minus": True,
    "axes.facecolor": "none",
}


@cache
def css_variables() -> dict[str, str]:
    """CSS variable of a page, for light and dark mode, that each color of a plot becomes."""
    named = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--on-accent"}
    series = {color: f"--series-{n}" for n, color in enumerate(SERIES)}
    return {**named, ACCENT: "--accent", **series}


def canvas(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """Make a plot of ``panels`` axes side by side (0 = none yet), width and height in inches."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels) if panels else None
    return figure, axes


def style() -> AbstractContextManager[None]:
    """Context with our matplotlib settings, for axes that are made after their canvas."""
    return rc_context(_STYLE)


def render(figure: Figure, name: str, format: Format = "svg") -> bytes:
    """Render a plot to bytes: SVG with a transparent background or PNG on white, without a date.

    Args:
        figure: from ``canvas``.
        name: salt of the ids inside the SVG, different for plots on one page.
        format: svg or png.
    """
    if format not in ("svg", "png"):
        raise ValueError(f"format is {format!r}: choose svg or png")
    file = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    background = "none" if format == "svg" else "white"
    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Missing glyphs do not matter in SVG: the browser has them.
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from")
        warnings.filterwarnings("ignore", message="(?s).*constrained_layout not applied")
        figure.savefig(file, format=format, dpi=160, facecolor=background, metadata=metadata)
    return file.getvalue()


def write_text(label: Text, text: str, **style: Any) -> None:
    """Set an untrusted text of a label: no formulas, no characters that cannot be drawn."""
    label.set_parse_math(False)
    label.set_text(sanitize(text))
    label.set(**style)


def tidy(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Style axes with a light grid and without a frame."""
    axes.spines[:].set_visible(False)
    axes.spines["bottom"].set_visible(grid == "y")
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.tick_params(length=0)


def label_bars(axes: Axes, bars: BarContainer, labels: Sequence[str]) -> None:
    """Label the end of each horizontal bar and leave room for the labels."""
    axes.bar_label(bars, labels=list(labels), padding=4, fontsize=8, color=INK)
    axes.margins(x=0.18)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label each line right of the axes, near its end, without overlaps.

    Args:
        axes: with a height of 0 to 100.
        ends: height, name and color of each line.
    """
    right = axes.get_xlim()[1]
    ordered = sorted(ends, key=lambda end: end[0])
    heights = separate_labels([end[0] for end in ordered], gap=7.0, highest=100.0)
    for height, (_, name, color) in zip(heights, ordered, strict=True):
        label = axes.text(right, height, "", color=color, va="center", fontsize=8.5)
        write_text(label, f" {name}")


def separate_labels(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Separate ascending label heights by ``gap`` or more: up first, then down from ``highest``."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    ceiling = highest
    for n in reversed(range(len(moved))):
        moved[n] = min(moved[n], ceiling)
        ceiling = moved[n] - gap
    return moved


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    named: Sequence[tuple[tuple[float, float], str]],
) -> None:
    """Label points beside them, each at the closest place that no point or label covers.

    Args:
        axes: of a figure whose layout is known.
        points: x and y of all points, which labels avoid.
        named: x and y of a point, and its label.
    """
    pixels = axes.figure.dpi / 72
    marks = [tuple(axes.transData.transform(point) / pixels) for point in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]  # left, bottom, right, top in points
    for start, end in pairwise(marks):
        between = [
            tuple(a + n / 24 * (b - a) for a, b in zip(start, end, strict=True))
            for n in range(1, 24)
        ]
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in between]
    inside = [edge / pixels for edge in axes.bbox.extents]
    for point, text in named:
        own = tuple(axes.transData.transform(point) / pixels)
        boxes = [_label_box(own, offset, 5.0 * len(text)) for offset in _OFFSETS]
        costs = [_label_cost(box, own, marks, taken, inside) for box in boxes]
        chosen = costs.index(min(costs))
        dx, dy = _OFFSETS[chosen]
        taken.append(boxes[chosen])
        arrow = {"arrowstyle": "-", "color": LINE, "linewidth": 0.7, "shrinkB": 3}
        is_far = math.hypot(dx, dy) > 15
        label = axes.annotate(
            " ", point, (dx, dy), textcoords="offset points", va="center", fontsize=8, color=INK,
            ha=_side(dx), arrowprops=arrow if is_far else None, zorder=4,
        )  # fmt: skip
        write_text(label, text)


_Box = tuple[float, float, float, float]
_OFFSETS = [
    (radius * math.cos(eighth * math.pi / 4), radius * math.sin(eighth * math.pi / 4))
    for radius in (10, 14, 19, 26, 34, 44, 56)
    for eighth in (1, 3, 7, 5, 2, 6, 0, 4)
]
"""Offsets of a label from its point, in points, the closest ones first."""


def _label_cost(
    box: _Box,
    own: tuple[float, ...],
    marks: Sequence[tuple[float, ...]],
    taken: Sequence[_Box],
    inside: Sequence[float],
) -> int:
    """Number of things that a label covers, plus those that make it a label of another point."""

    def distance(mark: tuple[float, ...]) -> float:
        sides = (box[0] - mark[0], mark[0] - box[2]), (box[1] - mark[1], mark[1] - box[3])
        return math.hypot(*(max(0.0, *side) for side in sides))

    closer = sum(distance(mark) < distance(own) for mark in marks if mark != own)
    is_outside = (
        box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
    )
    return sum(_overlap(box, other) for other in taken) + 2 * closer + 8 * is_outside


def _side(dx: float) -> Literal["left", "center", "right"]:
    return "center" if abs(dx) < 1 else "left" if dx > 0 else "right"


def _label_box(point: tuple[float, ...], offset: tuple[float, float], width: float) -> _Box:
    x, y = point[0] + offset[0], point[1] + offset[1]
    left = {"left": x, "center": x - width / 2, "right": x - width}[_side(offset[0])]
    return left, y - 5, left + width, y + 5


def _overlap(one: _Box, other: _Box) -> bool:
    apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    return not apart


def name_ticks(axis: Axis, ticks: Sequence[float], names: Sequence[str], **style: Any) -> None:
    """Name the ticks of an axis; like in ``write_text``, names are untrusted."""
    axis.set_ticks(list(ticks), labels=[sanitize(name) for name in names])
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
        label.set(**style)


def name_bars(axes: Axes, names: Sequence[str], *, has_scale: bool = True) -> None:
    """Name horizontal bars, first on top; without scale and grid where each bar has its label."""
    name_ticks(axes.yaxis, range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    tidy(axes, "x")
    if not has_scale:
        axes.set_xticks([])
        axes.grid(visible=False)


def color_legend(legend: Legend) -> None:
    """Set the untrusted texts of a legend."""
    for text in legend.get_texts():
        write_text(text, text.get_text(), color=INK)


def series_color(index: int, count: int) -> str:
    """Color of a line: by hue for a few lines, from dark to light for many."""
    if count <= len(SERIES):
        return SERIES[index]
    fraction = index / max(count - 1, 1)
    ends = ((0x0B, 0x3C, 0x8C), (0xE0, 0x8A, 0x1E))
    mixed = [round(a + (b - a) * fraction) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
