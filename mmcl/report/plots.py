"""Plots of one run, each as SVG bytes.

Scores are fractions (0.9 is drawn as 90 %). Names come from cards and are untrusted: they are never
read as formulas, and characters that cannot be drawn are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from mmcl.evaluation.class_metrics import ConfusionMatrix
from mmcl.evaluation.continual_metrics import (
    Metric,
    average_accuracy,
    forgetting_of,
    unseen_accuracy,
)
from mmcl.evaluation.cost import Ledger
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.report.formatting import duration, percent, shorten, size
from mmcl.report.plot_style import (
    ACCENT,
    GOOD,
    INK,
    LINE,
    MUTED,
    PAPER,
    SERIES,
    WARM,
    Format,
    canvas,
    color_legend,
    label_bars,
    label_ends,
    name_bars,
    name_ticks,
    render,
    series_color,
    tidy,
)

_DIRECT_LABELS = 10
_WIDE = 14
_HALF_PAGE = 5.8
_LEVELS = 20
_NUMBERED_CLASSES = 20
_PERCENT_TICKS = range(0, 101, 20)
_PERCENT_NAMES = ("0", "20", "40", "60", "80", "100 %")


def heat_map(matrix: AccuracyMatrix, format: Format = "svg") -> bytes:
    """Draw the accuracy matrix as a heat map, values in the cells, a frame where just learned.

    Eval-only tasks are set apart on the right; a dot means not measured. A wide matrix shows whole
    percent. Where columns have different scores, each is named with its own. Scores above 1 (not
    fractions) are drawn on a scale that ends at the highest.
    """
    figure, axes = _draw_map(matrix, 0, len(matrix.columns))
    axes.set_ylabel("after learning", color=MUTED)
    return render(figure, "matrix", format)


def shift_map(matrix: AccuracyMatrix) -> bytes:
    """Draw the square of trained tasks over what the card's ``shift`` says: time by time, say.

    Without the row before training and eval-only tasks; the frame is the diagonal.

    Raises:
        ValueError: if the matrix has no shift, or no row after training.
    """
    if matrix.shift is None or len(matrix.rows) < 2:
        raise ValueError(
            f"shift is {matrix.shift!r} and there are {len(matrix.rows)} rows: give a matrix with "
            "a shift and a learned task"
        )
    word = {"temporal": "time", "content": "domain", "language": "language"}[matrix.shift]
    figure, axes = _draw_map(matrix, 1, matrix.tasks)
    axes.set_ylabel(f"train {word}", color=MUTED)
    axes.set_xlabel(f"test {word}", color=MUTED)
    axes.xaxis.set_label_position("top")
    return render(figure, "shift")


def _draw_map(matrix: AccuracyMatrix, first_row: int, columns: int) -> tuple[Figure, Axes]:
    """Draw the cells from a row on, in the first columns."""
    rows = len(matrix.rows) - first_row
    cell = (0.36, 0.3) if len(matrix.columns) > _WIDE else (0.62, 0.42)
    figure, axes = canvas(2.6 + cell[0] * (columns + 0.3), 1.5 + cell[1] * rows)
    highest = max((v for row in matrix.values for v in row if v is not None), default=1.0)
    for row in range(first_row, len(matrix.rows)):
        for column in range(columns):
            _draw_cell(axes, matrix, row, column, max(highest, 1.0))
    axes.set_xlim(0, _left(matrix, columns - 1) + 1)
    axes.set_ylim(len(matrix.rows), first_row)
    axes.xaxis.tick_top()
    centers = [_left(matrix, column) + 0.5 for column in range(columns)]
    slant = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
    name_ticks(axes.xaxis, centers, _column_names(matrix)[:columns], **slant)
    middles = [row + 0.5 for row in range(first_row, len(matrix.rows))]
    name_ticks(axes.yaxis, middles, [shorten(name, 18) for name in matrix.rows[first_row:]])
    axes.tick_params(length=0, pad=5)
    axes.spines[:].set_visible(False)
    return figure, axes


def task_curves(matrix: AccuracyMatrix) -> bytes:
    """Draw the score of each task over training, dotted until it is learned, a mark where it is.

    Beyond ten tasks the lines are thin, dark to light in the order learned, and their mean is bold.
    """
    figure, axes = canvas(_HALF_PAGE, 3.4)
    _percent_axis(axes, matrix)
    ends: list[tuple[float, str, str]] = []
    is_crowded = matrix.tasks > _DIRECT_LABELS
    for task in range(matrix.tasks):
        points = [
            (row, 100 * value)
            for row in range(len(matrix.rows))
            if (value := matrix.get(row, task)) is not None
        ]
        if not points or matrix.columns[task].repeat_of:  # its line is that of the first
            continue
        color = series_color(task, matrix.tasks)
        since = [point for point in points if point[0] > task]
        learned = [point for point in since if point[0] == task + 1]
        axes.plot(*_xy(since), color=color, linewidth=0.8 if is_crowded else 1.8)
        axes.plot(*_xy(learned), "o", color=color, markersize=3 if is_crowded else 5)
        if not is_crowded:
            before = [point for point in points if point[0] <= task + 1]
            axes.plot(
                *_xy(before), color=color, linewidth=1.2, linestyle=(0, (1.5, 1.8)), alpha=0.9
            )
        ends.append((points[-1][1], shorten(matrix.names[task], 20), color))
    if is_crowded:
        mean = _over_training(average_accuracy, matrix, 1)
        axes.plot(*_xy(mean), color=INK, linewidth=3)
        ends = [(mean[-1][1], "mean", INK)] if mean else []
    label_ends(axes, ends)
    return render(figure, "curves")


def seen_and_unseen(matrix: AccuracyMatrix) -> bytes:
    """Draw the average accuracy of the tasks learned so far, and of those not learned yet."""
    figure, axes = canvas(_HALF_PAGE, 3.4)
    _percent_axis(axes, matrix)
    ends = []
    for name, metric, first, color in (
        ("seen tasks", average_accuracy, 1, ACCENT),
        ("tasks not learned yet", unseen_accuracy, 0, WARM),
    ):
        points = _over_training(metric, matrix, first)
        if not points:
            continue
        axes.plot(*_xy(points), "o-", color=color, linewidth=1.8, markersize=4)
        ends.append((points[-1][1], name, color))
    label_ends(axes, ends)
    return render(figure, "average")


def forgetting_bars(matrix: AccuracyMatrix, after: int | None = None) -> bytes:
    """Draw the forgetting of each earlier task, gains to the left of zero."""
    last = (matrix.last_row or 0) if after is None else after
    forgotten = [forgetting_of(matrix, task, last).value for task in range(1, max(last, 1))]
    figure, axes = canvas(_HALF_PAGE, 1.0 + 0.3 * max(len(forgotten), 1))
    values = [100 * (value or 0.0) for value in forgotten]
    colors = [WARM if value > 0 else GOOD for value in values]
    bars = axes.barh(range(len(values)), values, color=colors, height=0.62)
    labels = ["·" if value is None else f"{100 * value:+.1f}" for value in forgotten]
    label_bars(axes, bars, labels)
    name_bars(axes, [shorten(name, 20) for name in matrix.names[: len(values)]])
    axes.axvline(0, color=LINE, linewidth=1)
    axes.set_xlabel("below its best score, percent points", color=MUTED)
    return render(figure, "forgetting")


def confusion_map(confusion: ConfusionMatrix) -> bytes:
    """Draw a confusion matrix, each row in percent of its samples, in 20 shades.

    Frames hold the classes that were first learned in one task. Few classes have the percent in
    the cell, rounded; a row without test samples stays empty.
    """
    count = len(confusion.classes)
    is_numbered = count <= _NUMBERED_CLASSES
    cell = min(0.46, max(7.2 / count, 0.125))
    figure, axes = canvas(2.2 + cell * count, 1.3 + cell * count)
    shades: dict[int, list[tuple[int, int]]] = {}
    totals = [0] * count
    for (row, _), samples in confusion.counts.items():
        totals[row] += samples
    for (row, column), samples in sorted(confusion.counts.items()):
        share = samples / totals[row]
        shades.setdefault(round(share * (_LEVELS - 1)), []).append((row, column))
        if is_numbered:
            color = PAPER if share > 0.6 else INK
            place = (column + 0.5, row + 0.52)
            text = axes.text(*place, f"{100 * share:.0f}", ha="center", va="center", fontsize=8)
            text.set_color(color)
    for shade, cells in sorted(shades.items()):
        # One path per shade: thousands of rectangles would make the page large.
        squares = [_square(row, column) for row, column in cells]
        alpha = 0.08 + 0.92 * shade / (_LEVELS - 1)
        path = Path.make_compound_path(*squares)
        axes.add_patch(PathPatch(path, facecolor=ACCENT, alpha=alpha, linewidth=0))
    for start, end in confusion.blocks:
        corner, side = (start, start), end - start
        frame = Rectangle(corner, side, side, fill=False, edgecolor=INK, linewidth=1.0)
        frame.set(clip_on=False, zorder=3)
        axes.add_patch(frame)
    axes.set_xlim(0, count)
    axes.set_ylim(count, 0)
    axes.set_aspect("equal")
    axes.xaxis.tick_top()
    middles = [index + 0.5 for index in range(count)]
    names = [shorten(name, 22) for name in confusion.classes]
    size = 8.5 if cell > 0.2 else 6.5
    slant = {"rotation": 60, "ha": "left", "rotation_mode": "anchor", "fontsize": size}
    name_ticks(axes.xaxis, middles, names, **slant)
    name_ticks(axes.yaxis, middles, names, fontsize=size)
    axes.tick_params(length=0, pad=3)
    axes.spines[:].set_color(LINE)
    axes.set_ylabel("right class", color=MUTED)
    axes.set_xlabel("predicted class", color=MUTED)
    return render(figure, "confusion")


def _square(row: int, column: int) -> Path:
    left, top, right, bottom = column + 0.03, row + 0.03, column + 0.97, row + 0.97
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return Path(corners, closed=True)


def cost_bars(ledger: Ledger) -> bytes:
    """Draw the training time and the stored bytes of each task."""
    entries = list(ledger)
    figure, (left, right) = canvas(_HALF_PAGE, 1.0 + 0.3 * max(len(entries), 1), 2)
    names = [shorten(entry.task, 16) for entry in entries]
    times = [entry.seconds for entry in entries]
    kept = [entry.state_bytes for entry in entries]
    for axes, values, labels, color, title in (
        (left, times, [duration(value) for value in times], ACCENT, "training time"),
        (right, kept, [size(value) for value in kept], SERIES[2], "stored after the task"),
    ):
        bars = axes.barh(range(len(entries)), values, color=color, height=0.62)
        label_bars(axes, bars, labels)
        name_bars(axes, names if axes is left else [""] * len(names), has_scale=False)
        axes.set_title(title, color=MUTED, fontsize=9, loc="left")
    return render(figure, "cost")


def lenient_bars(strict: AccuracyMatrix, lenient: AccuracyMatrix, after: int) -> bytes:
    """Draw the strict score of every learned task, and stacked on it what only lenient counts.

    Args:
        strict: the scores.
        lenient: of the same shape, scores in any form.
        after: number of learned tasks, 1 or more.
    """
    figure, axes = canvas(_HALF_PAGE, 1.35 + 0.3 * after)
    tasks = range(after)
    exact = [strict.get(after, task) or 0.0 for task in tasks]
    known = [lenient.get(after, task) for task in tasks]
    pairs = list(zip(exact, known, strict=True))
    lefts = [100 * value for value in exact]
    rest = [0.0 if k is None else max(100 * (k - a), 0.0) for a, k in pairs]
    own = axes.barh(tasks, lefts, color=ACCENT, height=0.62)
    bars = axes.barh(tasks, rest, left=lefts, color=SERIES[4], alpha=0.6, height=0.62)
    texts = [percent(a) if k is None else f"{percent(a)} of {percent(k)}" for a, k in pairs]
    label_bars(axes, bars, texts)
    name_bars(axes, [shorten(name, 20) for name in strict.names[:after]])
    axes.set_xlim(0, 124)
    name_ticks(axes.xaxis, _PERCENT_TICKS, _PERCENT_NAMES)
    legend = axes.legend(
        (own, bars), ("in the requested form", "in another form"), loc="lower left",
        bbox_to_anchor=(-0.02, 1.0), ncols=2, frameon=False, fontsize=8.5, handlelength=1.2,
    )  # fmt: skip
    color_legend(legend)
    axes.set_xlabel("after the last task", color=MUTED)
    return render(figure, "form")


def _draw_cell(axes: Axes, matrix: AccuracyMatrix, row: int, column: int, highest: float) -> None:
    value, left = matrix.get(row, column), _left(matrix, column)
    middle = (left + 0.5, row + 0.5)
    is_wide = len(matrix.columns) > _WIDE
    small = 8.0 if is_wide else 8.5
    if value is None:
        axes.text(*middle, "·", color=MUTED, ha="center", va="center", fontsize=small)
        return
    fraction = min(max(value / highest, 0.0), 1.0)
    corner = (left + 0.03, row + 0.04)
    axes.add_patch(
        Rectangle(corner, 0.94, 0.92, facecolor=ACCENT, alpha=0.05 + 0.95 * fraction, linewidth=0)
    )
    if row == column + 1 and column < matrix.tasks:
        axes.add_patch(Rectangle(corner, 0.94, 0.92, fill=False, edgecolor=INK, linewidth=1.4))
    color = PAPER if fraction > 0.6 else INK
    text = f"{100 * value:.0f}" if is_wide else percent(value)
    axes.text(*middle, text, color=color, ha="center", va="center", fontsize=small)


def _column_names(matrix: AccuracyMatrix) -> list[str]:
    names = [shorten(name, 18) for name in matrix.names]
    scores = [column.score for column in matrix.columns]
    if len(set(scores)) == 1:
        return names
    return [f"{name} · {shorten(score, 12)}" for name, score in zip(names, scores, strict=True)]


def _left(matrix: AccuracyMatrix, column: int) -> float:
    return column + (0.3 if column >= matrix.tasks else 0.0)


def _percent_axis(axes: Axes, matrix: AccuracyMatrix) -> None:
    rows = len(matrix.rows)
    step = max(1, rows // 12)
    shown = range(0, rows, step)
    axes.set_xlim(-0.15, max(rows - 1, 1) + 0.1)
    names = [shorten(matrix.rows[row], 12 if rows < 7 else 8) for row in shown]
    turn = {"rotation": 0, "ha": "center"} if rows < 7 else {"rotation": 30, "ha": "right"}
    name_ticks(axes.xaxis, list(shown), names, **turn)
    axes.set_ylim(-2, 102)
    name_ticks(axes.yaxis, _PERCENT_TICKS, _PERCENT_NAMES)
    axes.autoscale(enable=False)
    tidy(axes)


def _over_training(metric: Metric, matrix: AccuracyMatrix, first: int) -> list[tuple[int, float]]:
    """Return row and percent of a metric after every task from ``first`` to the last measured."""
    rows = range(first, (matrix.last_row or 0) + 1)
    values = [(row, metric(matrix, row).value) for row in rows]
    return [(row, 100 * value) for row, value in values if value is not None]


def _xy(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
