"""``mmcl data``: make, check and look at streams; each action is a module of its own."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mmcl.commands.words import CommandParser

ACTIONS = {
    "make": "a stream from a folder, a table (csv, parquet) or LLaVA-style JSON of your own",
    "check": "verify a stream before a run: every fault at once",
    "show": "one HTML page: pictures, texts, classes and sizes of every task",
    "list": "name the streams and sets that can be built, a line each",
    "build": "build one of them: mmcl data build digits",
    "convert": "a stream from LLaVA-style JSON, with options for its test files",
}


def main(argv: Sequence[str]) -> int:
    """Make a stream from data of your own, check it, look at it, or build a known one."""
    if argv[:1] and argv[0] in ACTIONS:
        action = importlib.import_module(f"mmcl.commands.data_{argv[0]}")
        return int(action.main(list(argv[1:])))
    parser = CommandParser(prog="mmcl data", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, summary in ACTIONS.items():
        actions.add_parser(name, help=summary, add_help=False)
    parser.parse_args(argv)
    return 0
