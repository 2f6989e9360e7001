"""One page that shows what a stream is made of: pictures, texts, classes, sizes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from mmcl.report.html import inline_svg, render_template
from mmcl.report.stream_plots import answer_bars, class_bars, class_map, size_bars
from mmcl.report.words import clean_lines

_TURNS, _LETTERS = 6, 320
_ANSWERS = 10
_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class ShownSample:
    """A sample on the page.

    Attributes:
        key: its name.
        shard: that it lies in.
        label: name of its class, "" without one.
        picture: PNG or JPEG, small; empty without one.
        size: of the picture as recorded, in words.
        said: speaker and text of every turn; the speaker of a caption is "".
    """

    key: str
    shard: str
    label: str = ""
    picture: bytes = b""
    size: str = ""
    said: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ShownTask:
    """A task, probe or source on the page.

    Attributes:
        name: of it.
        role: "task", "probe" or "source".
        facts: what there is to say of it in a few words each: (what, words).
        train: training samples.
        test: test samples.
        classes: (name, training samples, test samples) of each that were looked into.
        answers: the most frequent right answers and how often each comes.
        answered: answers that were looked into.
        samples: to look at.
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
    """A stream on the page.

    Attributes:
        name: of it.
        facts: (what, words).
        about: what it is, "" = not said.
        origin: (what, words) on where it comes from and what may be done with it.
        faults: of the check.
        remarks: of the check.
        looked: what the numbers are of, a sentence; "" = of all samples.
        tasks: tasks, probes, sources.
    """

    name: str
    facts: tuple[tuple[str, str], ...] = ()
    about: str = ""
    origin: tuple[tuple[str, str], ...] = ()
    faults: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    looked: str = ""
    tasks: tuple[ShownTask, ...] = ()


def stream_page(stream: ShownStream) -> str:
    """Make a page that needs no network and no other file.

    Everything in it is escaped: captions, names and dialogues may hold anything.

    Returns:
        the HTML.
    """
    learned = [task for task in stream.tasks if task.role == "task" and task.classes]
    names = list(dict.fromkeys(each[0] for task in learned for each in task.classes))
    return render_template(
        "stream.html.j2",
        {
            "stream": stream,
            "sizes": _sizes(stream.tasks),
            "map": _class_map(learned, names),
            "classes": len(names),
            "columns": _columns(stream.tasks),
            "tasks": [_task(task, place) for place, task in enumerate(stream.tasks)],
        },
    )


def _columns(tasks: Sequence[ShownTask]) -> list[tuple[str, bool]]:
    """Give the words of all facts in their order, and whether they count something."""
    words = dict.fromkeys(word for task in sorted(tasks, key=_facts) for word, _ in task.facts)
    given = [[dict(task.facts).get(word, "0") for task in tasks] for word in words]
    return [
        (word, all(each.replace(",", "").isdigit() for each in own))
        for word, own in zip(words, given, strict=True)
    ]


def _facts(task: ShownTask) -> int:
    return -len(task.facts)


def _sizes(tasks: Sequence[ShownTask]) -> Markup:
    svg = size_bars([(task.name, task.train, task.test) for task in tasks])
    return inline_svg(svg, "sizes", "Training and test samples of every task")


def _class_map(tasks: Sequence[ShownTask], names: Sequence[str]) -> Markup | None:
    """Draw which class comes in which task, if there is something to see."""
    if len(tasks) < 2 or len(names) < 2:
        return None
    place = {name: number for number, name in enumerate(names)}
    counts = [[0] * len(names) for _ in tasks]
    for own, task in zip(counts, tasks, strict=True):
        for name, train, _ in task.classes:
            own[place[name]] += train
    svg = class_map([task.name for task in tasks], names, counts)
    return inline_svg(svg, "map", "Which classes come in which task")


def _task(task: ShownTask, place: int) -> dict[str, Any]:
    plot, caption = None, ""
    if task.classes:
        svg = class_bars(task.classes, f"classes-{place}")
        plot = inline_svg(svg, f"classes-{place}", f"Samples of every class of {task.name}")
        caption = "Samples of every class"
    elif task.answers:
        svg = answer_bars(task.answers[:_ANSWERS], task.answered, f"answers-{place}")
        plot = inline_svg(svg, f"answers-{place}", f"Most frequent answers of {task.name}")
        caption = "The most frequent right answers"
    return {
        "task": task,
        "facts": dict(task.facts),
        "plot": plot,
        "caption": caption,
        "samples": [_sample(sample) for sample in task.samples],
    }


def _sample(sample: ShownSample) -> dict[str, Any]:
    kind = "jpeg" if sample.picture.startswith(_JPEG) else "png"
    source = base64.b64encode(sample.picture).decode("ascii")
    return {
        "sample": sample,
        "source": f"data:image/{kind};base64,{source}" if sample.picture else "",
        "is_small": kind == "png",
        "turns": [(speaker, _cut(text)) for speaker, text in sample.said[:_TURNS]],
        "more": max(0, len(sample.said) - _TURNS),
    }


def _cut(text: str) -> str:
    shown = clean_lines(text)
    return shown if len(shown) <= _LETTERS else f"{shown[:_LETTERS].rstrip()}…"
