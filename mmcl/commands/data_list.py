"""``mmcl data list``: the streams and public sets that can be built, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.commands.words import CommandParser
from mmcl.data.builders.public_sets import list_sets, read_set
from mmcl.data.builders.streams import STREAMS


def main(argv: Sequence[str]) -> int:
    """Name the streams and sets that ``mmcl data build`` can make."""
    CommandParser(prog="mmcl data list", description=main.__doc__).parse_args(argv)
    for name, stream in STREAMS.items():
        cards = ", ".join(Path(card).stem for card in stream.cards)
        print(f"{name:16} {stream.summary} (cards: {cards})")
    for name in list_sets():
        print(f"{name:16} {read_set(name).summary} (needs --source)")
    return 0
