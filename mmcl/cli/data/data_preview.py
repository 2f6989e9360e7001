"""``mmcl data preview <card>``: write an HTML preview of a stream."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from mmcl.cli.data.data_validate import (
    RENAMED_OPTIONS,
    access_options,
    check,
    image_sizes,
    reading_parser,
    text_lengths,
)
from mmcl.cli.parser import count_or_fraction, refuse_renamed_options
from mmcl.core import TaskStream, write_atomic
from mmcl.core.card import validate_card
from mmcl.data.stored_sample import count_errors
from mmcl.data.validate.preview import DrawnSample, draw_samples
from mmcl.data.validate.results import SplitFindings, StreamFindings, TaskFindings
from mmcl.report.formatting import shorten, size
from mmcl.report.stream_page import ShownSample, ShownStream, ShownTask, stream_page

_ABOUT = """\
Write one HTML page with images, texts, classes and sizes of every task; it needs no network and no
other file. Errors are listed on it, so it also shows a stream that has some.
"""
_EXAMPLES = """\
  mmcl data preview data/digits/digits.yaml
  mmcl data preview data/mine/mine.yaml --samples 16 --max_samples 0 --out mine.html
"""


def main(argv: Sequence[str]) -> int:
    """Write an HTML preview of a stream."""
    parser = reading_parser("preview", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    add("--out", type=Path, help="the page (next to the card, <card>.html)")
    add("--samples", type=int, default=8, metavar="N",
        help="samples shown of every task (%(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random choice of samples (%(default)s)")
    add("--max_samples", type=count_or_fraction, default=2000, metavar="N",
        help="count classes and sizes in N samples of a split, 0 = all (%(default)s)")  # fmt: skip
    add("--shards", type=int, default=64, metavar="N",
        help="open at most N shards of every split, 0 = all (%(default)s)")  # fmt: skip
    add("--open", action="store_true", help="open the page in the browser")
    refuse_renamed_options(argv, RENAMED_OPTIONS)
    given = parser.parse_args(argv)
    if given.samples < 0:
        raise ValueError(f"--samples is {given.samples}, expected 0 or more")
    found = check(given, max_samples=given.max_samples or None, shards=given.shards or None)
    out = given.out or given.card.with_suffix(".html")
    write_atomic(out, stream_page(_stream(found, given)))
    if found.errors:
        print(f"the page lists {count_errors(found.num_errors)}")
    print(f"page: {out}")
    if given.open:
        webbrowser.open(out.absolute().as_uri())
    return 0


def _stream(found: StreamFindings, given: argparse.Namespace) -> ShownStream:
    if found.stream is None:
        return ShownStream(found.name, errors=found.errors, warnings=found.warnings)
    card = validate_card(given.card)[0]
    decoded = sum(part.decoded for part in found.splits)
    samples = sum(_count(each, part) for each in found.tasks for part in each.splits)
    origin = (("License", card.license), ("Source", card.source), ("Citation", card.citation))
    return ShownStream(
        name=found.name,
        facts=_facts(found.stream, found),
        about=card.description,
        origin=tuple(pair for pair in origin if pair[1]),
        errors=found.errors,
        warnings=found.warnings,
        counted=(
            f"Classes, answers, images and texts are counted in {decoded:,} of {samples:,} "
            "samples, evenly spaced; --max_samples 0 counts all."
            if decoded < samples
            else ""
        ),
        tasks=tuple(_task(found.stream, each, given) for each in found.tasks),
    )


def _facts(stream: TaskStream, found: StreamFindings) -> tuple[tuple[str, str], ...]:
    train = sum(_count(each, each.train) for each in found.tasks)
    test = sum(_count(each, each.test) for each in found.tasks)
    total = size(sum(part.size_bytes for part in found.splits))
    is_incomplete = any(part.counted < part.shards for part in found.splits)
    facts = [
        ("scenario", f"{stream.scenario}-incremental"),
        ("tasks", str(len(stream.tasks))),
        ("eval-only tasks", str(len(stream.eval_only_tasks))),
        ("sources", str(len(stream.sources))),
        ("classes", f"{len(stream.classes_seen(len(stream.tasks))):,}"),
        ("training", f"{train:,}"),
        ("test", f"{test:,}"),
        ("shards", f"{sum(part.shards for part in found.splits):,}"),
        ("size", f"{'more than ' * is_incomplete}{total}"),
    ]
    return tuple(fact for fact in facts if fact[1] != "0")


def _task(stream: TaskStream, found: TaskFindings, given: argparse.Namespace) -> ShownTask:
    first = found.splits[0] if found.splits else SplitFindings()
    labels = [
        part.labels if part is not None and part.labels else (0,) * len(found.classes)
        for part in (found.train, found.test)
    ]
    has_labels = any(part.labels for part in found.splits)
    drawn = draw_samples(
        stream,
        found.task,
        "test" if found.train is None else "train",
        given.samples,
        seed=given.seed,
        **access_options(given),
    )
    names = _column_names(stream, found)
    return ShownTask(
        name=found.task.name,
        role=found.role,
        facts=_task_facts(found, first),
        train=_count(found, found.train),
        test=_count(found, found.test),
        classes=tuple(zip(found.classes, *labels, strict=True)) if has_labels else (),
        answers=first.answers,
        answered=first.decoded - first.bad,
        samples=tuple(_sample(each, names) for each in drawn),
    )


def _task_facts(found: TaskFindings, first: SplitFindings) -> tuple[tuple[str, str], ...]:
    task = found.task
    has_classes = task.task_type == "classification" or task.decoding == "candidates"
    facts = [
        ("task type", task.task_type),
        ("training", f"{_count(found, found.train):,}"),
        ("test", f"{_count(found, found.test):,}"),
        ("size", size(sum(part.size_bytes for part in found.splits))),
        ("classes", f"{len(found.classes):,}" if has_classes else ""),
        ("scorer", task.scorer),
        ("images", image_sizes(first)),
        ("characters", text_lengths(first)),
        ("unreadable", f"{sum(part.bad for part in found.splits):,}"),
    ]
    return tuple(fact for fact in facts if fact[1] not in ("", "0"))


def _count(found: TaskFindings, part: SplitFindings | None) -> int:
    """Return the samples of a split: counted, or as on the card if not all shards were opened."""
    if part is None:
        return 0
    stated = found.task.size if part is found.train else found.task.test_size
    return stated if part.counted < part.shards and stated else part.samples


def _column_names(stream: TaskStream, found: TaskFindings) -> dict[int, str]:
    if found.task.index >= 0:
        return dict(zip(found.task.class_ids, found.classes, strict=True))
    return dict(enumerate(stream.display_names(stream.classes_seen(len(stream.tasks)))))


def _sample(drawn: DrawnSample, names: dict[int, str]) -> ShownSample:
    return ShownSample(
        key=shorten(drawn.key, 60),
        shard=drawn.shard,
        label=names.get(drawn.column, ""),
        image=drawn.thumbnail,
        size="{} × {}".format(*drawn.size) if drawn.size else "",
        turns=drawn.turns,
    )
