"""``mmcl data check <card>``: every fault of a stream at once, before a run meets one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mmcl.commands.words import CommandParser
from mmcl.data.builders.streams import card_path
from mmcl.data.checks.checking import check_stream
from mmcl.data.checks.findings import PartFindings, StreamFindings, TaskFindings
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.remote.cache import bytes_of
from mmcl.metrics.scorers import SCORERS
from mmcl.report.words import clean, shorten, size

_ABOUT = """\
Verify a stream before a run and list every fault at once: the card, missing or damaged shards,
counts, hashes, labels, texts, dialogues, pictures, repeated keys, and test pictures that are
trained on. Every sample is read by the rules of training. The exit status is 1 if there is a fault.
"""
_EXAMPLES = """\
  mmcl data check data/digits/digits.yaml
  mmcl data check data/mine/mine.yaml --workers 16 --pixels
  mmcl data check data/huge/huge.yaml --limit 2000   # looks into 2000 samples of every part
"""

_WIDTH = 160
"""Letters of a line of the table where it goes into a file."""


def main(argv: Sequence[str]) -> int:
    """Verify a stream and say what is wrong with it, or what it holds."""
    given = _parser().parse_args(argv)
    found = with_shard_bar(
        lambda progress: check_stream(
            given.card,
            progress=progress,
            pixels=given.pixels,
            limit=given.limit,
            **reading_options(given),
        )
    )
    if given.json:
        print(json.dumps(found.plain(), indent=2))
    else:
        _tell(found)
    return int(bool(found.faults))


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """Take the options of every command that reads a whole stream."""
    parser.add_argument(
        "card", type=a_card, metavar="CARD", help="of the stream: a .yaml, its folder, or a name"
    )
    parser.add_argument(
        "--workers", type=int, help="processes (as many as there are cores; a small stream needs 0)"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for remote shards and indexes ($MMCL_CACHE, ~/.cache)"
    )
    parser.add_argument(
        "--cache_limit", type=bytes_of, metavar="SIZE", help="of remote shards there, as 50GB"
    )
    parser.add_argument(
        "--allow_pipes", action="store_true", help="run 'pipe:' addresses, which are commands"
    )
    parser.add_argument(
        "--max_pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="of the largest picture that is decoded (%(default)s)",
    )


def reading_options(given: argparse.Namespace) -> dict[str, Any]:
    """Return these options as ``check_stream`` takes them."""
    names = ("workers", "cache", "cache_limit", "allow_pipes", "max_pixels")
    return {**{name: getattr(given, name) for name in names}, "scorers": tuple(SCORERS)}


def a_card(text: str) -> Path:
    """Find a card by its path, its folder, or the name of a stream that mmcl builds."""
    try:
        return card_path(text, Path("data"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count_or_share(text: str) -> int | float:
    """Read a limit: "200" is a count, "0.02" a share."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def with_shard_bar(
    work: Callable[[Callable[[int, int], None]], StreamFindings],
) -> StreamFindings:
    """Check a stream while a bar on the error output shows how many shards are done."""
    columns = (TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    is_quiet = not console.is_terminal
    with Progress(*columns, transient=True, console=console, disable=is_quiet) as bar:
        line = bar.add_task("", total=None)
        return work(lambda done, total: bar.update(line, completed=done, total=total))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="mmcl data check",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_reading_options(parser)
    parser.add_argument(
        "--limit",
        type=count_or_share,
        metavar="N",
        help="200 = look into so many samples of every part, 0.02 = into that share (all)",
    )
    parser.add_argument(
        "--pixels",
        action="store_true",
        help="compare pictures by pixels, so that one saved again in another file is found",
    )
    parser.add_argument("--json", action="store_true", help="print everything found as JSON")
    return parser


def _tell(found: StreamFindings) -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    name = clean(found.name)
    if found.faults:
        count = "1 fault" if len(found.faults) == 1 else f"{len(found.faults)} faults"
        console.print(f"stream '{name}' has {count}:")
        for fault in found.faults:
            console.print(f"  - {clean(fault)}")
    for remark in found.remarks:
        console.print(f"remark: {clean(remark)}")
    if not found.faults:
        wide = console.width if console.is_terminal else _WIDTH
        Console(highlight=False, markup=False, width=wide).print(_table(found.tasks))
        console.print(_last_words(found))


def _last_words(found: StreamFindings) -> str:
    parts = [part for each in found.tasks for part in each.parts]
    looked, samples = sum(part.looked for part in parts), sum(part.samples for part in parts)
    held = f"{samples:,} samples in {size(sum(part.size_bytes for part in parts))}"
    name = clean(found.name)
    if looked < samples:
        return f"stream '{name}': no fault in the {looked:,} that were looked into, of {held}"
    return f"stream '{name}' is good: {held}, every one of them was read"


def _table(tasks: Sequence[TaskFindings]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    lines = [_line(each) for each in tasks]
    for title in lines[0]:
        # A column that says nothing of any task is left out.
        if any(line[title] != "-" for line in lines):
            is_number = title in ("train", "test", "bytes", "classes")
            table.add_column(title, justify="right" if is_number else "left")
        else:
            lines = [{key: line[key] for key in line if key != title} for line in lines]
    for line in lines:
        table.add_row(*line.values())
    return table


def _line(found: TaskFindings) -> dict[str, str]:
    train, test = found.train, found.test
    main_part = found.parts[0]
    smallest, largest = _extremes(found, main_part)
    return {
        "task": shorten(found.task.name, 24),
        "kind": found.task.kind if found.role == "task" else found.role,
        "train": "-" if train is None else f"{train.samples:,}",
        "test": "-" if test is None else f"{test.samples:,}",
        "bytes": size(sum(part.size_bytes for part in found.parts)),
        "classes": f"{len(found.classes):,}" if main_part.labels else "-",
        "smallest": smallest,
        "largest": largest,
        "top answer": _top_answer(main_part),
        "pictures": _sizes(main_part),
        "letters": "-" if not main_part.lengths else _lengths(main_part.lengths),
    }


def _extremes(found: TaskFindings, part: PartFindings) -> tuple[str, str]:
    if not part.labels:
        return "-", "-"
    places = range(len(part.labels))
    ends = (min(places, key=part.labels.__getitem__), max(places, key=part.labels.__getitem__))
    low, high = (f"{shorten(found.classes[end], 12)} ({part.labels[end]:,})" for end in ends)
    return low, high


def _top_answer(part: PartFindings) -> str:
    if not part.answers:
        return "-"
    answer, count = part.answers[0]
    return f"{shorten(answer, 16)} ({100 * count / max(1, part.looked - part.bad):.0f} %)"


def _sizes(part: PartFindings) -> str:
    if part.sizes is None:
        return "-"
    low, middle, high = (f"{width} x {height}" for width, height in part.sizes)
    return middle if low == high else f"{middle}, {low} to {high}"


def _lengths(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]:,}, up to {lengths[1]:,}"
