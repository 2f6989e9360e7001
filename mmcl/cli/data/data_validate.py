"""``mmcl data validate <card>``: validate a stream before a run and list all its errors at once."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmcl.cli.parser import CommandParser, count_or_fraction, refuse_renamed_options
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.remote.cache import parse_size
from mmcl.data.stored_sample import count_errors
from mmcl.data.validate.results import SplitFindings, StreamFindings, TaskFindings
from mmcl.data.validate.validate import check_stream
from mmcl.evaluation.scorers import SCORERS
from mmcl.report.formatting import sanitize, shorten, size
from mmcl.streams.registry import card_path

_ABOUT = """\
Validate a stream before a run and list all errors at once: the card, missing or damaged shards,
counts, hashes, labels, texts, dialogues, images, repeated keys, and test images that are trained
on. Every sample is decoded as in training. The exit status is 1 if there is an error.
"""
_EXAMPLES = """\
  mmcl data validate data/digits/digits.yaml
  mmcl data validate data/mine/mine.yaml --num_workers 16 --pixels
  mmcl data validate data/huge/huge.yaml --max_samples 2000   # decode 2000 samples of every split
"""

RENAMED_OPTIONS = {
    "--workers": "--num_workers", "--cache": "--cache_dir", "--limit": "--max_samples",
}  # fmt: skip
_WIDTH = 160
"""Characters in a line of the table where it goes into a file."""


def main(argv: Sequence[str]) -> int:
    """Validate a stream and print its errors, or a table of its tasks."""
    parser = reading_parser("validate", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    add("--max_samples", type=count_or_fraction, metavar="N",
        help="200: decode at most 200 samples of a split; 0.02: that fraction (all)")  # fmt: skip
    add("--pixels", action="store_true",
        help="compare images by pixels, to find duplicates in other files or formats")  # fmt: skip
    add("--json", action="store_true", help="print the result as JSON")
    refuse_renamed_options(argv, RENAMED_OPTIONS)
    given = parser.parse_args(argv)
    found = check(given, pixels=given.pixels, max_samples=given.max_samples)
    if given.json:
        print(json.dumps(found.plain(), indent=2))
    else:
        _print(found)
    return int(bool(found.errors))


def reading_parser(action: str, about: str, examples: str) -> CommandParser:
    """Return the parser of a command that reads a whole stream, with the options of all of them."""
    parser = CommandParser(
        prog=f"mmcl data {action}",
        description=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("card", type=card_argument, metavar="CARD",
        help="card of the stream: a .yaml file, its folder, or a stream's name")  # fmt: skip
    add("--num_workers", type=int, help="processes (one per core; 0 is best for a small stream)")
    add("--cache_dir", type=Path,
        help="folder for remote shards and indexes ($MMCL_CACHE, ~/.cache)")  # fmt: skip
    add("--cache_limit", type=parse_size, metavar="SIZE",
        help="size limit of that folder, such as 50GB")  # fmt: skip
    add("--allow_pipes", action="store_true",
        help="run 'pipe:' addresses, which are shell commands")  # fmt: skip
    add("--max_pixels", type=int, default=MAX_PIXELS, metavar="N",
        help="an image of more pixels is an error (%(default)s)")  # fmt: skip
    return parser


def check(given: argparse.Namespace, **options: Any) -> StreamFindings:
    """Validate a stream with a progress bar of its shards on stderr.

    Args:
        given: the options of `reading_parser`.
        options: further arguments of ``check_stream``.
    """
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    is_quiet = not console.is_terminal
    with Progress(*columns, transient=True, console=console, disable=is_quiet) as bar:
        line = bar.add_task("", total=None)
        return check_stream(
            given.card,
            num_workers=given.num_workers,
            progress=lambda done, total: bar.update(line, completed=done, total=total),
            scorers=tuple(SCORERS),
            **access_options(given),
            **options,
        )


def access_options(given: argparse.Namespace) -> dict[str, Any]:
    """Return how shards are fetched and decoded, as arguments of functions of ``mmcl.data``."""
    names = ("cache_dir", "cache_limit", "allow_pipes", "max_pixels")
    return {name: getattr(given, name) for name in names}


def card_argument(text: str) -> Path:
    """Return the path of a card, given as path, folder, or name of a stream that mmcl builds."""
    try:
        return card_path(text, Path("data"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _print(found: StreamFindings) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if found.errors:
        console.print(f"stream '{sanitize(found.name)}' has {count_errors(found.num_errors)}:")
        for error in found.errors:
            console.print(f"  - {sanitize(error)}")
    for warning in found.warnings:
        console.print(f"warning: {sanitize(warning)}")
    for note in found.notes:
        console.print(f"note: {sanitize(note)}")
    if not found.errors:
        wide = console.width if console.is_terminal else _WIDTH
        Console(highlight=False, markup=False, width=wide).print(_table(found.tasks))
        console.print(_summary(found))


def _summary(found: StreamFindings) -> str:
    decoded = sum(part.decoded for part in found.splits)
    samples = sum(part.samples for part in found.splits)
    total = f"{samples:,} samples in {size(sum(part.size_bytes for part in found.splits))}"
    name = sanitize(found.name)
    if decoded < samples:
        return f"stream '{name}': no error in the {decoded:,} that were decoded, of {total}"
    return f"stream '{name}' is good: {total}, all of them decoded"


def _table(tasks: Sequence[TaskFindings]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    lines = [_line(each) for each in tasks]
    titles = [title for title in lines[0] if any(line[title] != "-" for line in lines)]
    for title in titles:
        is_number = title in ("train", "test", "bytes", "classes")
        table.add_column(title, justify="right" if is_number else "left")
    for line in lines:
        table.add_row(*(line[title] for title in titles))
    return table


def _line(found: TaskFindings) -> dict[str, str]:
    main_part = found.splits[0]
    smallest, largest = _extremes(found, main_part)
    return {
        "task": shorten(found.task.name, 24),
        "type": found.task.task_type if found.role == "task" else found.role,
        "train": "-" if found.train is None else f"{found.train.samples:,}",
        "test": "-" if found.test is None else f"{found.test.samples:,}",
        "bytes": size(sum(part.size_bytes for part in found.splits)),
        "classes": f"{len(found.classes):,}" if main_part.labels else "-",
        "smallest": smallest,
        "largest": largest,
        "top answer": _top_answer(main_part),
        "images": image_sizes(main_part) or "-",
        "characters": text_lengths(main_part) or "-",
    }


def image_sizes(part: SplitFindings) -> str:
    """Return the median size of a split's images and their range, "" without images."""
    if part.sizes is None:
        return ""
    low, middle, high = (f"{width} × {height}" for width, height in part.sizes)
    return middle if low == high else f"{middle} ({low} to {high})"


def text_lengths(part: SplitFindings) -> str:
    """Return the median and largest number of characters of a split's texts, "" without texts."""
    return "{:,}, up to {:,}".format(*part.lengths) if part.lengths else ""


def _extremes(found: TaskFindings, part: SplitFindings) -> tuple[str, str]:
    if not part.labels:
        return "-", "-"
    counts = list(zip(part.labels, found.classes, strict=True))
    ends = (end(counts, key=itemgetter(0)) for end in (min, max))
    low, high = (f"{shorten(name, 12)} ({count:,})" for count, name in ends)
    return low, high


def _top_answer(part: SplitFindings) -> str:
    if not part.answers:
        return "-"
    answer, count = part.answers[0]
    return f"{shorten(answer, 16)} ({100 * count / max(1, part.decoded - part.bad):.0f} %)"
