"""``mmcl data``: list and build the streams that mmcl can make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.words import CommandParser
from mmcl.data.builders import script
from mmcl.data.builders.streams import STREAMS, find_stream


def main(argv: Sequence[str]) -> int:
    """List the streams that mmcl can make, or build one."""
    parser = CommandParser(prog="mmcl data", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="name the streams, a line each")
    build = actions.add_parser("build", help="build one: mmcl data build digits")
    build.add_argument("stream", help=", ".join(STREAMS))
    given, rest = parser.parse_known_args(argv)
    if given.action == "build":
        stream, _ = find_stream(given.stream)
        name = next(key for key, value in STREAMS.items() if value is stream)
        script.main(name, rest)
        return 0
    if rest:
        parser.error(f"unknown words: {' '.join(rest)}")
    for name, stream in STREAMS.items():
        cards = ", ".join(Path(card).stem for card in stream.cards)
        print(f"{name:16} {stream.summary} (cards: {cards})")
    return 0
