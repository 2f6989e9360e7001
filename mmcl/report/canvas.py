"""One look for every plot: colours, canvas, and bytes that are the same each time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text

from mmcl.report.words import clean

Format = Literal["svg", "png"]

INK = "#1f2430"
MUTED = "#6b7280"
LINE = "#d9dde5"
PAPER = "#fefefe"
ACCENT = "#0b62b4"
WARM = "#d55e00"
GOOD = "#009e73"
# Okabe and Ito's palette, told apart with any common colour blindness; yellow is left out.
SERIES = ("#0b72b2", "#d55e00", "#009e73", "#b5589a", "#b07d00", "#3c9fd6", "#7a6cc9")
# On a page these become variables, so that the reader's light or dark mode can choose.
THEMED = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--on-accent",
    ACCENT: "--accent",
    **{colour: f"--series-{place}" for place, colour in enumerate(SERIES)},
}

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


def canvas(width: float, height: float, panels: int = 1) -> tuple[Figure, Any]:
    """Make a figure of ``panels`` axes side by side (0 = none yet), width and height in inches."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels) if panels else None
    return figure, axes


def style() -> AbstractContextManager[None]:
    """Hold matplotlib's settings at ours, for axes that are made later than their canvas."""
    return rc_context(_STYLE)


def render(figure: Figure, name: str, format: Format) -> bytes:
    """Turn a figure into bytes: SVG with a clear background, PNG on white; no date in either.

    Args:
        figure: from ``canvas``.
        name: tells the ids inside one SVG from those of another on the same page.
        format: svg or png.
    """
    if format not in ("svg", "png"):
        raise ValueError(f"format is {format!r}: choose svg or png")
    file = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if format == "svg" else {"Software": None}
    background = "none" if format == "svg" else "white"
    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # Names in any script are fine in SVG, where the reader's browser has the letters.
        warnings.filterwarnings("ignore", message="(?s)Glyph .* missing from")
        warnings.filterwarnings("ignore", message="(?s).*constrained_layout not applied")
        figure.savefig(file, format=format, dpi=160, facecolor=background, metadata=metadata)
    return file.getvalue()


def write_text(label: Text, words: str, **style: Any) -> None:
    """Set a text that may hold anything: no formulas, no letters that cannot be drawn."""
    label.set_parse_math(False)
    label.set_text(clean(words))
    label.set(**style)


def tidy(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
    """Leave only what is read: a light grid and no frame."""
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" and grid == "y")
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=LINE, linewidth=0.7)
    axes.tick_params(length=0)


def label_bars(axes: Axes, bars: BarContainer, labels: Sequence[str]) -> None:
    """Write a label at the end of each horizontal bar and leave room for it."""
    axes.bar_label(bars, labels=list(labels), padding=4, fontsize=8, color=INK)
    axes.margins(x=0.18)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each line right of the axes, near its end but apart from the others.

    Args:
        axes: its height runs from 0 to 100.
        ends: height, name and colour of each line.
    """
    right = axes.get_xlim()[1]
    ordered = sorted(ends, key=lambda end: end[0])
    heights = spread([end[0] for end in ordered], gap=7.0, highest=100.0)
    for height, (_, name, colour) in zip(heights, ordered, strict=True):
        label = axes.text(right, height, "", color=colour, va="center", fontsize=8.5)
        write_text(label, f" {name}")


def spread(heights: Sequence[float], gap: float, highest: float) -> list[float]:
    """Move ascending heights apart to at least ``gap``, up first, then down from ``highest``."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    ceiling = highest
    for place in reversed(range(len(moved))):
        moved[place] = min(moved[place], ceiling)
        ceiling = moved[place] - gap
    return moved


def name_ticks(axis: Axis, places: Sequence[float], names: Sequence[str], **style: Any) -> None:
    """Put names at places of an axis; like ``write_text``, they may hold anything."""
    axis.set_ticks(list(places), labels=[clean(name) for name in names])
    for label in axis.get_ticklabels():
        label.set_parse_math(False)
        label.set(**style)


def series_colour(place: int, count: int) -> str:
    """Give a line's colour: told apart by hue while few, by order (dark to light) when many."""
    if count <= len(SERIES):
        return SERIES[place]
    share = place / max(count - 1, 1)
    ends = ((0x0B, 0x3C, 0x8C), (0xE0, 0x8A, 0x1E))
    mixed = [round(a + (b - a) * share) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)
