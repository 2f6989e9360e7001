"""HTML page that shows a stream: images, texts, classes and sizes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmcl.report.formatting import clean_lines
from mmcl.report.html import inline_svg, render_template
from mmcl.report.stream_plots import answer_bars, class_bars, class_map, size_bars

_TURNS, _CHARACTERS = 6, 320
_ANSWERS = 10
_JPEG = b"\xff\xd8\xff"


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
    return render_template(
        "stream.html.j2",
        {
            "stream": stream,
            "sizes": _sizes(stream.tasks),
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


def _sizes(tasks: Sequence[ShownTask]) -> Markup:
    svg = size_bars([(task.name, task.train, task.test) for task in tasks])
    return inline_svg(svg, "sizes", "Training and test samples of every task")


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
