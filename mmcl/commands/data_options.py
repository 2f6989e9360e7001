"""What the makers of instruction data share on the command line: options, a bar, the last words."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from mmcl.data.builders.llava_convert import BuiltTask
from mmcl.data.builders.llava_survey import Told
from mmcl.data.builders.llava_task import Options

Made = TypeVar("Made")

_NAMED = 5


def with_bar(work: Callable[[Told], Made]) -> Made:
    """Run a build while a bar shows what it is at."""
    with Progress(transient=True) as bar:
        line = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            if done % 50 == 0 or done == total:
                bar.update(line, description=what, completed=done, total=total)

        return work(show)


def report(card: Path, built: Sequence[BuiltTask]) -> None:
    """Say what was built, what was left out, and where the card is."""
    for one in built:
        entry = one.entry
        print(
            f"{entry['name']:16} {entry['size']:,} to learn from, {entry['test_size']:,} to test "
            f"on, scored by {entry['scorer']}"
        )
        if one.left_out:
            listed = card.parent / f"{entry['name']}.left_out.txt"
            print(f"{'':16} {len(one.left_out):,} left out (all in {listed}):")
            for fault in one.left_out[:_NAMED]:
                print(f"{'':16} - {fault}")
    print(card)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Take the options of every maker of instruction data; see ``Options``."""
    parser.add_argument(
        "--limit", type=_number, help="200 = so many samples of each file, 0.02 = that share"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (%(default)s)")
    parser.add_argument(
        "--shard_mb", type=float, default=256, help="size of a shard in MiB (%(default)s)"
    )
    parser.add_argument(
        "--max_faults",
        type=float,
        default=Options.max_faults,
        help="share of samples that may be left out as unusable (%(default)s)",
    )


def _number(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def options_of(given: argparse.Namespace) -> Options:
    """Return what `add_options` took."""
    return Options(
        seed=given.seed,
        hold_out=getattr(given, "hold_out", Options.hold_out),
        limit=given.limit,
        shard_bytes=int(given.shard_mb * (1 << 20)),
        max_faults=given.max_faults,
    )
