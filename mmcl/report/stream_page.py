"""Page that shows a stream before training: images, texts, plots of classes and sizes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mmcl.report.formatting import clean_lines, format_count, shorten
from mmcl.report.html import inline_svg, render_template
from mmcl.report.plot_style import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    SERIES,
    canvas,
    label_bars,
    name_bars,
    name_ticks,
    render,
    tidy,
)

_TURNS, _CHARACTERS = 6, 320
_ANSWERS = 10
_JPEG = b"\xff\xd8\xff"
_NAMED_BARS = 32
_NAMED_CELLS = 28
_MOST_COLUMNS = 400

Counts = Sequence[tuple[str, int, int]]
"""Name, training samples, test samples."""


@dataclass(frozen=True)
class ShownSample:
    """Sample on the page.

    Attributes:
        key: its name.
        shard: name of its shard.
        label: name of its class, "" without one.
        image: thumbnail as PNG or JPEG; empty without one.
        size: of the image itself, such as "640 × 480".
        turns: role and text of every turn; the role of a caption is "".
    """

    key: str
    shard: str
    label: str = ""
    image: bytes = b""
    size: str = ""
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ShownTask:
    """Task, eval-only task or source on the page.

    Attributes:
        name: its name.
        role: "task", "eval-only task" or "source".
        facts: (heading, short text) pairs.
        train: number of training samples.
        test: number of test samples.
        classes: (name, training samples, test samples) among those that were decoded.
        answers: the most frequent right answers and how often each occurs.
        answered: number of answers that were counted.
        samples: to show.
    """

    name: str
    role: str
    facts: tuple[tuple[str, str], ...] = ()
    train: int = 0
    test: int = 0
    classes: tuple[tuple[str, int, int], ...] = ()
    answers: tuple[tuple[str, int], ...] = ()
    answered: int = 0
    samples: tuple[ShownSample, ...] = ()


@dataclass(frozen=True)
class ShownStream:
    """Stream on the page.

    Attributes:
        name: its name.
        facts: (heading, short text) pairs.
        about: description, "" = none.
        origin: (heading, text) pairs on license, source and citation.
        errors: errors of the validation.
        warnings: warnings of the validation.
        counted: sentence on which samples were counted; "" = all.
        tasks: tasks, then eval-only tasks and sources.
    """

    name: str
    facts: tuple[tuple[str, str], ...] = ()
    about: str = ""
    origin: tuple[tuple[str, str], ...] = ()
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    counted: str = ""
    tasks: tuple[ShownTask, ...] = ()


def stream_page(stream: ShownStream) -> str:
    """Return the HTML page of a stream; it needs no network and no other file.

    Everything in it is escaped: captions, names and dialogues are untrusted.
    """
    trained = [task for task in stream.tasks if task.role == "task" and task.classes]
    names = list(dict.fromkeys(each[0] for task in trained for each in task.classes))
    sizes = size_bars([(task.name, task.train, task.test) for task in stream.tasks])
    return render_template(
        "stream.html.j2",
        {
            "stream": stream,
            "sizes": inline_svg(sizes, "sizes", "Training and test samples of every task"),
            "map": _class_map(trained, names),
            "classes": len(names),
            "columns": _columns(stream.tasks),
            "tasks": [_task(task, number) for number, task in enumerate(stream.tasks)],
        },
    )


def _columns(tasks: Sequence[ShownTask]) -> list[tuple[str, bool]]:
    """Return the headings of all facts in order, and whether their texts are numbers."""
    longest_first = sorted(tasks, key=lambda task: -len(task.facts))
    headings = dict.fromkeys(heading for task in longest_first for heading, _ in task.facts)
    texts = [[dict(task.facts).get(heading, "0") for task in tasks] for heading in headings]
    return [
        (heading, all(text.replace(",", "").isdigit() for text in own))
        for heading, own in zip(headings, texts, strict=True)
    ]


def _class_map(tasks: Sequence[ShownTask], names: Sequence[str]) -> Markup | None:
    """Draw which class occurs in which task; None with fewer than two of either."""
    if len(tasks) < 2 or len(names) < 2:
        return None
    index = {name: number for number, name in enumerate(names)}
    counts = [[0] * len(names) for _ in tasks]
    for own, task in zip(counts, tasks, strict=True):
        for name, train, _ in task.classes:
            own[index[name]] += train
    svg = class_map([task.name for task in tasks], names, counts)
    return inline_svg(svg, "map", "Which classes occur in which task")


def _task(task: ShownTask, number: int) -> dict[str, Any]:
    plot, caption = None, ""
    if task.classes:
        svg = class_bars(task.classes, f"classes-{number}")
        plot = inline_svg(svg, f"classes-{number}", f"Samples of every class of {task.name}")
        caption = "Samples of every class"
    elif task.answers:
        svg = answer_bars(task.answers[:_ANSWERS], task.answered, f"answers-{number}")
        plot = inline_svg(svg, f"answers-{number}", f"Most frequent answers of {task.name}")
        caption = "The most frequent right answers"
    return {
        "task": task,
        "facts": dict(task.facts),
        "plot": plot,
        "caption": caption,
        "samples": [_sample(sample) for sample in task.samples],
    }


def _sample(sample: ShownSample) -> dict[str, Any]:
    kind = "jpeg" if sample.image.startswith(_JPEG) else "png"
    source = base64.b64encode(sample.image).decode("ascii")
    return {
        "sample": sample,
        "source": f"data:image/{kind};base64,{source}" if sample.image else "",
        "is_small": kind == "png",
        "turns": [(role, _cut(text)) for role, text in sample.turns[:_TURNS]],
        "more": max(0, len(sample.turns) - _TURNS),
    }


def _cut(text: str) -> str:
    shown = clean_lines(text)
    return shown if len(shown) <= _CHARACTERS else f"{shown[:_CHARACTERS].rstrip()}…"


def size_bars(tasks: Counts) -> bytes:
    """Draw the training and test samples of every task, a pair of bars each."""
    figure, axes = canvas(9.2, 0.8 + 0.36 * len(tasks))
    train, test = [task[1] for task in tasks], [task[2] for task in tasks]
    for counts, shift, color in ((train, -0.19, ACCENT), (test, 0.19, SERIES[1])):
        heights = [index + shift for index in range(len(tasks))]
        bars = axes.barh(heights, counts, height=0.36, color=color)
        label_bars(axes, bars, [format_count(count) if count else "" for count in counts])
    name_bars(axes, [shorten(name, 24) for name, _, _ in tasks], has_scale=False)
    return render(figure, "sizes")


def class_bars(classes: Counts, name: str) -> bytes:
    """Draw the samples of every class of a task; many classes as two curves, largest class first.

    Args:
        classes: in the order of the card.
        name: makes the ids of this plot differ from those of others on the page.
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
    return render(figure, name)


def answer_bars(answers: Sequence[tuple[str, int]], total: int, name: str) -> bytes:
    """Draw the most frequent right answers in percent of all.

    Args:
        answers: (answer, how often it occurs), most frequent first.
        total: number of all answers.
        name: see ``class_bars``.
    """
    figure, axes = canvas(5.8, 0.35 + 0.25 * len(answers))
    shares = [100 * count / max(total, 1) for _, count in answers]
    bars = axes.barh(range(len(answers)), shares, height=0.62, color=ACCENT)
    label_bars(axes, bars, [f"{share:.1f} %" for share in shares])
    name_bars(axes, [shorten(answer, 40) for answer, _ in answers], has_scale=False)
    return render(figure, name)


def class_map(
    tasks: Sequence[str],
    classes: Sequence[str],
    counts: Sequence[Sequence[int]],
) -> bytes:
    """Draw which class occurs in which task: a cell is darker the more samples it has.

    Args:
        tasks: names, top to bottom in the order of training.
        classes: names, left to right in order of appearance; only the first 400 are drawn.
        counts: per task, the training samples of every class.
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
    axes.spines[:].set_visible(False)
    return render(figure, "classes")


def _draw_cells(axes: Axes, counts: Sequence[Sequence[int]], is_named: bool) -> None:
    most = max((count for own in counts for count in own), default=1) or 1
    inset = 0.04 if is_named else 0.0
    for row, own in enumerate(counts):
        for column, count in enumerate(own):
            if not count:
                continue
            fraction = count / most
            corner, alpha = (column + inset, row + 0.06), 0.15 + 0.85 * fraction
            cell = Rectangle(corner, 1 - 2 * inset, 0.88, facecolor=ACCENT, alpha=alpha)
            cell.set_linewidth(0)
            axes.add_patch(cell)
            if is_named:
                text = axes.text(column + 0.5, row + 0.5, format_count(count), ha="center")
                text.set(va="center", fontsize=6.5 if count < 1000 else 5.0)
                text.set_color(PAPER if fraction > 0.55 else INK)
