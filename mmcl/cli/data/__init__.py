"""``mmcl data``: convert, validate, preview, list, build streams, each in its own module."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from mmcl.cli.parser import CommandParser, refuse_renamed

ACTIONS = {
    "convert": "convert a folder, a table (csv, parquet) or LLaVA-style JSON to a stream",
    "remove": "take a task, an eval-only task or a source off a card",
    "validate": "validate a stream before a run, and list all errors at once",
    "preview": "show images, texts, classes and sizes of every task on one HTML page",
    "list": "list the streams and public datasets that can be built",
    "build": "build one of these: mmcl data build digits",
}
RENAMED = {"make": "convert", "check": "validate", "show": "preview"}


def main(argv: Sequence[str]) -> int:
    """Convert your own data to a stream, validate and preview it, or build a known stream."""
    if argv[:1] and argv[0] in ACTIONS:
        module, function = ("build", "list_streams") if argv[0] == "list" else (argv[0], "main")
        action = importlib.import_module(f"mmcl.cli.data.data_{module}")
        return int(getattr(action, function)(list(argv[1:])))
    refuse_renamed(argv[0] if argv else "", RENAMED)
    parser = CommandParser(prog="mmcl data", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    for name, summary in ACTIONS.items():
        actions.add_parser(name, help=summary, add_help=False)
    parser.parse_args(argv)
    return 0
