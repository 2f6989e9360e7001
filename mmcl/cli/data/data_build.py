"""``mmcl data build``: build a synthetic stream of mmcl, or a stream from a downloaded dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmcl.cli.data.data_convert import add_options, report, shared_options, with_bar
from mmcl.cli.parser import CommandParser
from mmcl.streams.public_sets import build_set, list_sets, read_set
from mmcl.streams.registry import STREAMS, build_from_command_line, find_stream

_LAYOUT = """\
The dataset must be in --source as published; missing files are listed with their address.
Nothing is downloaded. NAME may also be the path of your own description (.yaml).
"""


def main(argv: Sequence[str]) -> int:
    """Build a stream. ``mmcl data build NAME --help`` lists the options of each."""
    if argv[:1] and not argv[0].startswith("-"):
        return _build(argv[0], argv[1:])
    parser = CommandParser(prog="mmcl data build", description=main.__doc__)
    known = (*STREAMS, *list_sets())
    parser.add_argument("stream", metavar="NAME", help=f"one of {', '.join(known)}")
    parser.parse_args(argv)
    return 0


def _build(name: str, rest: Sequence[str]) -> int:
    if name in list_sets() or name.endswith((".yaml", ".yml")):
        return _build_set(name, rest)
    try:
        stream, _ = find_stream(name)
    except ValueError as error:
        raise ValueError(f"{error}, or of the public sets {', '.join(list_sets())}") from None
    build_from_command_line(next(key for key, value in STREAMS.items() if value is stream), rest)
    return 0


def _build_set(name: str, rest: Sequence[str]) -> int:
    described = read_set(name)
    tasks = ", ".join(task.name for task in described.tasks)
    parser = CommandParser(
        prog=f"mmcl data build {name}",
        description=f"{described.summary}. {_LAYOUT}\nGet it: {described.get}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder of the downloaded dataset"
    )
    out = Path("data") / described.name
    parser.add_argument(
        "--out", type=Path, default=out, help="folder of shards and card (%(default)s)"
    )
    parser.add_argument("--tasks", default="", help=f"comma-separated names among {tasks} (all)")
    add_options(parser, max_bad_fraction=0.01)
    given = parser.parse_args(rest)
    chosen = [task.strip() for task in given.tasks.split(",") if task.strip()]
    card, converted = with_bar(
        build_set, described, given.source, given.out, tasks=chosen, **shared_options(given)
    )
    report(card, converted)
    return 0


def list_streams(argv: Sequence[str]) -> int:
    """List the streams and public datasets that ``mmcl data build`` can build."""
    CommandParser(prog="mmcl data list", description=main.__doc__).parse_args(argv)
    width = max(map(len, (*STREAMS, *list_sets())))
    for name, stream in STREAMS.items():
        cards = ", ".join(Path(card).stem for card in stream.cards)
        print(f"{name:{width}}  {stream.summary} (cards: {cards})")
    for name in list_sets():
        print(f"{name:{width}}  {read_set(name).summary} (needs --source)")
    return 0
