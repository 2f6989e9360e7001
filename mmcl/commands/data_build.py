"""``mmcl data build``: one of the streams that mmcl can make, or a public set as published."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.data_options import add_options, options_of, report, with_bar
from mmcl.commands.words import CommandParser
from mmcl.data.builders import script
from mmcl.data.builders.public_sets import build_set, list_sets, read_set
from mmcl.data.builders.streams import STREAMS, find_stream

_LAYOUT = """\
The set must lie in --source as it is published; what is missing is listed with its address.
Nothing is downloaded. A path of a description of your own (.yaml) takes the place of the name.
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
    script.main(next(key for key, value in STREAMS.items() if value is stream), rest)
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
        "--source", type=Path, required=True, help="folder into which the set was downloaded"
    )
    out = Path("data") / described.name
    parser.add_argument("--out", type=Path, default=out, help="folder (%(default)s)")
    parser.add_argument("--tasks", default="", help=f"some of {tasks}; default: all")
    add_options(parser)
    given = parser.parse_args(rest)
    chosen = [task.strip() for task in given.tasks.split(",") if task.strip()]
    card, built = with_bar(
        lambda progress: build_set(
            described, given.source, given.out, options_of(given), tasks=chosen, progress=progress
        )
    )
    report(card, built)
    return 0
