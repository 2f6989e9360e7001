"""Plots of a stream before training: samples of each task, class and answer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mmcl.report.formatting import format_count, shorten
from mmcl.report.plot_style import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Format,
    canvas,
    label_bars,
    name_ticks,
    render,
    tidy,
)

Counts = Sequence[tuple[str, int, int]]
"""Name, training samples, test samples."""

_NAMED_BARS = 32
_NAMED_CELLS = 28
_MOST_COLUMNS = 400


def size_bars(tasks: Counts, format: Format = "svg") -> bytes:
    """Draw the training and test samples of every task, a pair of bars each."""
    figure, axes = canvas(9.2, 0.8 + 0.36 * len(tasks))
    train, test = [task[1] for task in tasks], [task[2] for task in tasks]
    for counts, shift, color in ((train, -0.19, ACCENT), (test, 0.19, SERIES[1])):
        heights = [index + shift for index in range(len(tasks))]
        bars = axes.barh(heights, counts, height=0.36, color=color)
        label_bars(axes, bars, [format_count(count) if count else "" for count in counts])
    _name_bars(axes, [shorten(name, 24) for name, _, _ in tasks])
    return render(figure, "sizes", format)


def class_bars(classes: Counts, name: str, format: Format = "svg") -> bytes:
    """Draw the samples of every class of a task; many classes as two curves, largest class first.

    Args:
        classes: in the order of the card.
        name: makes the ids of this plot differ from those of others on the page.
        format: svg or png.
    """
    is_named = len(classes) <= _NAMED_BARS
    figure, axes = canvas(max(2.6, min(9.2, 1.1 + 0.4 * len(classes))) if is_named else 9.2, 2.1)
    ordered = classes if is_named else sorted(classes, key=lambda each: -each[1] - each[2])
    indices = range(len(ordered))
    train, test = [each[1] for each in ordered], [each[2] for each in ordered]
    if is_named:
        both = bool(any(train) and any(test))
        wide, shift = (0.38, 0.2) if both else (0.62, 0.0)
        axes.bar([index - shift for index in indices], train, width=wide, color=ACCENT)
        axes.bar([index + shift for index in indices], test, width=wide, color=SERIES[1])
        turn = len(classes) > 6 or max(len(each[0]) for each in classes) > 10
        slant = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turn else {}
        name_ticks(axes.xaxis, indices, [shorten(each[0], 18) for each in ordered], **slant)
        axes.set_xlim(-0.6, len(ordered) - 0.4)
    else:
        axes.fill_between(indices, train, step="mid", color=ACCENT, alpha=0.75, linewidth=0)
        axes.step(indices, test, where="mid", color=SERIES[1], linewidth=1.4)
        axes.set_xlim(-0.5, len(ordered) - 0.5)
        axes.set_xlabel(f"{len(ordered):,} classes, those with most samples first", color=MUTED)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    tidy(axes)
    return render(figure, name, format)


def answer_bars(
    answers: Sequence[tuple[str, int]], total: int, name: str, format: Format = "svg"
) -> bytes:
    """Draw the most frequent right answers in percent of all.

    Args:
        answers: (answer, how often it occurs), most frequent first.
        total: number of all answers.
        name: see ``class_bars``.
        format: svg or png.
    """
    figure, axes = canvas(5.8, 0.35 + 0.25 * len(answers))
    shares = [100 * count / max(total, 1) for _, count in answers]
    bars = axes.barh(range(len(answers)), shares, height=0.62, color=ACCENT)
    label_bars(axes, bars, [f"{share:.1f} %" for share in shares])
    _name_bars(axes, [shorten(answer, 40) for answer, _ in answers])
    return render(figure, name, format)


def class_map(
    tasks: Sequence[str],
    classes: Sequence[str],
    counts: Sequence[Sequence[int]],
    format: Format = "svg",
) -> bytes:
    """Draw which class occurs in which task: a cell is darker the more samples it has.

    Args:
        tasks: names, top to bottom in the order of training.
        classes: names, left to right in order of appearance; only the first 400 are drawn.
        counts: per task, the training samples of every class.
        format: svg or png.
    """
    shown = min(len(classes), _MOST_COLUMNS)
    is_named = shown <= _NAMED_CELLS
    wide = 0.34 if is_named else max(0.02, 7.4 / shown)
    figure, axes = canvas(2.0 + wide * shown, (1.3 if is_named else 0.75) + 0.3 * len(tasks))
    cells = [own[:shown] for own in counts]
    _draw_cells(axes, cells, is_named)
    axes.set_xlim(0, max(shown, 1))
    axes.set_ylim(len(tasks), 0)
    middles = [row + 0.5 for row in range(len(tasks))]
    name_ticks(axes.yaxis, middles, [shorten(name, 24) for name in tasks])
    axes.xaxis.tick_top()
    if is_named:
        slant = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
        centers = [column + 0.5 for column in range(shown)]
        name_ticks(axes.xaxis, centers, [shorten(each, 16) for each in classes[:shown]], **slant)
    else:
        axes.set_xticks([])
        more = f", the first {shown}" if shown < len(classes) else ""
        axes.set_title(f"{len(classes):,} classes{more}", color=MUTED, fontsize=9, loc="left")
    axes.tick_params(length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return render(figure, "classes", format)


def _name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars and leave out scale and grid, for each bar has its own label."""
    name_ticks(axes.yaxis, range(len(names)), names)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.set_xticks([])
    tidy(axes, "x")
    axes.grid(visible=False)


def _draw_cells(axes: Axes, counts: Sequence[Sequence[int]], is_named: bool) -> None:
    most = max((count for own in counts for count in own), default=1) or 1
    inset = 0.04 if is_named else 0.0
    for row, own in enumerate(counts):
        for column, count in enumerate(own):
            if not count:
                continue
            fraction = count / most
            corner, alpha = (column + inset, row + 0.06), 0.15 + 0.85 * fraction
            cell = Rectangle(
                corner, 1 - 2 * inset, 0.88, facecolor=ACCENT, alpha=alpha, linewidth=0
            )
            axes.add_patch(cell)
            if is_named:
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    format_count(count),
                    color=PAPER if fraction > 0.55 else INK,
                    ha="center",
                    va="center",
                    fontsize=6.5 if count < 1000 else 5.0,
                )
