"""``mmcl data show <card>``: one HTML page on which a person sees what a stream is made of."""

from __future__ import annotations

import argparse
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.data_check import (
    add_reading_options,
    count_or_share,
    reading_options,
    with_shard_bar,
)  # fmt: skip
from mmcl.commands.words import CommandParser
from mmcl.core import TaskStream, write_atomic
from mmcl.core.card import survey_card
from mmcl.data.checks.checking import check_stream
from mmcl.data.checks.findings import PartFindings, StreamFindings, TaskFindings
from mmcl.data.checks.showing import DrawnSample, draw_samples
from mmcl.report.stream_page import ShownSample, ShownStream, ShownTask, stream_page
from mmcl.report.words import shorten, size

_ABOUT = """\
Write one HTML page with pictures, texts, classes and sizes of every task; it needs no network and
no other file. What cannot be used is listed on it, so it also shows a stream that has faults.
"""
_EXAMPLES = """\
  mmcl data show data/digits/digits.yaml
  mmcl data show data/mine/mine.yaml --samples 16 --limit 0 --out mine.html
"""
_LIMIT, _SHARDS = 2000, 64


def main(argv: Sequence[str]) -> int:
    """Write a page that shows a stream."""
    given = _parser().parse_args(argv)
    if given.samples < 0:
        raise ValueError(f"--samples is {given.samples}, expected 0 or more")
    found = with_shard_bar(
        lambda progress: check_stream(
            given.card,
            progress=progress,
            limit=given.limit or None,
            shards=given.shards or None,
            **reading_options(given),
        )
    )
    out = given.out or given.card.with_suffix(".html")
    write_atomic(out, stream_page(_stream(found, given)))
    if found.faults:
        count = len(found.faults)
        print(f"{count} faults are" if count > 1 else "1 fault is", "listed on the page")
    print(f"page: {out}")
    if given.open:
        webbrowser.open(out.absolute().as_uri())
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mmcl data show",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_reading_options(parser)
    parser.add_argument("--out", type=Path, help="the page (beside the card, <card>.html)")
    parser.add_argument(
        "--samples", type=int, default=8, metavar="N", help="shown of every task (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of their choice (%(default)s)")
    parser.add_argument(
        "--limit",
        type=count_or_share,
        default=_LIMIT,
        metavar="N",
        help="count classes and sizes in so many samples of every part, 0 = all (%(default)s)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=_SHARDS,
        metavar="N",
        help="and open at most so many shards of every part, 0 = all (%(default)s)",
    )
    parser.add_argument("--open", action="store_true", help="in the browser")
    return parser


def _stream(found: StreamFindings, given: argparse.Namespace) -> ShownStream:
    if found.stream is None:
        return ShownStream(found.name, faults=found.faults, remarks=found.remarks)
    card = survey_card(given.card)[0]
    parts = [part for each in found.tasks for part in each.parts]
    looked, samples = sum(part.looked for part in parts), sum(map(_samples, found.tasks))
    origin = (("Licence", card.licence), ("Source", card.source), ("Citation", card.citation))
    return ShownStream(
        name=found.name,
        facts=_facts(found.stream, found),
        about=card.description,
        origin=tuple(pair for pair in origin if pair[1]),
        faults=found.faults,
        remarks=found.remarks,
        looked=(
            f"Classes, answers, pictures and texts are counted in {looked:,} of {samples:,} "
            "samples, spread evenly; --limit 0 counts all."
            if looked < samples
            else ""
        ),
        tasks=tuple(_task(found.stream, each, given) for each in found.tasks),
    )


def _facts(stream: TaskStream, found: StreamFindings) -> tuple[tuple[str, str], ...]:
    train = sum(_count(each, each.train) for each in found.tasks)
    test = sum(_count(each, each.test) for each in found.tasks)
    parts = [part for each in found.tasks for part in each.parts]
    held = sum(part.size_bytes for part in parts)
    is_part = any(part.counted < part.shards for part in parts)
    facts = [
        ("scenario", f"{stream.scenario}-incremental"),
        ("tasks", str(len(stream.tasks))),
        ("probes", str(len(stream.probes))),
        ("sources", str(len(stream.sources))),
        ("classes", f"{len(stream.classes_until(len(stream.tasks))):,}"),
        ("training", f"{train:,}"),
        ("test", f"{test:,}"),
        ("shards", f"{sum(part.shards for part in parts):,}"),
        ("size", f"{'more than ' * is_part}{size(held)}"),
    ]
    return tuple(fact for fact in facts if fact[1] != "0")


def _task(stream: TaskStream, found: TaskFindings, given: argparse.Namespace) -> ShownTask:
    first = found.parts[0] if found.parts else PartFindings()
    labels = [
        part.labels if part is not None and part.labels else (0,) * len(found.classes)
        for part in (found.train, found.test)
    ]
    has_labels = any(part.labels for part in found.parts)
    drawn = draw_samples(
        stream,
        found.task,
        "test" if found.train is None else "train",
        given.samples,
        seed=given.seed,
        cache=given.cache,
        cache_limit=given.cache_limit,
        allow_pipes=given.allow_pipes,
        max_pixels=given.max_pixels,
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
        answered=first.looked - first.bad,
        samples=tuple(_sample(each, names) for each in drawn),
    )


def _task_facts(found: TaskFindings, first: PartFindings) -> tuple[tuple[str, str], ...]:
    task = found.task
    has_classes = task.kind == "classify" or task.decode == "candidates"
    facts = [
        ("kind", task.kind),
        ("training", f"{_count(found, found.train):,}"),
        ("test", f"{_count(found, found.test):,}"),
        ("size", size(sum(part.size_bytes for part in found.parts))),
        ("classes", f"{len(found.classes):,}" if has_classes else ""),
        ("scorer", task.scorer),
        ("pictures", _sizes(first)),
        ("letters", "{:,}, up to {:,}".format(*first.lengths) if first.lengths else ""),
        ("unreadable", f"{sum(part.bad for part in found.parts):,}"),
    ]
    return tuple(fact for fact in facts if fact[1] not in ("", "0"))


def _sizes(part: PartFindings) -> str:
    if part.sizes is None:
        return ""
    low, middle, high = (f"{width} × {height}" for width, height in part.sizes)
    return middle if low == high else f"{middle} ({low} to {high})"


def _samples(found: TaskFindings) -> int:
    return _count(found, found.train) + _count(found, found.test)


def _count(found: TaskFindings, part: PartFindings | None) -> int:
    """Return the samples of a part: counted, or as the card says if not all shards were opened."""
    if part is None:
        return 0
    stated = found.task.size if part is found.train else found.task.test_size
    return stated if part.counted < part.shards and stated else part.samples


def _column_names(stream: TaskStream, found: TaskFindings) -> dict[int, str]:
    if found.task.index >= 0:
        return dict(zip(found.task.labels, found.classes, strict=True))
    return dict(enumerate(stream.classes_until(len(stream.tasks))))


def _sample(drawn: DrawnSample, names: dict[int, str]) -> ShownSample:
    return ShownSample(
        key=shorten(drawn.key, 60),
        shard=drawn.shard,
        label=names.get(drawn.column, ""),
        picture=drawn.picture,
        size="{} × {}".format(*drawn.size) if drawn.size else "",
        said=drawn.said,
    )
