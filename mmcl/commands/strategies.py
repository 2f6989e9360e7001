"""``mmcl strategies``: what exists, what it remembers, what it asks of the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmcl.commands.words import CommandParser
from mmcl.core import Strategy
from mmcl.strategies import discover


def main(argv: Sequence[str]) -> int:
    """List every strategy: what it does, what it remembers, what it asks of the model."""
    parser = CommandParser(prog="mmcl strategies", description=main.__doc__)
    parser.add_argument("--markdown", action="store_true", help="as a table for a document")
    given = parser.parse_args(argv)
    rows = [describe(name, kind) for name, kind in discover().items()]
    titles = ("strategy", "what it does", "remembers", "asks of the model")
    if given.markdown:
        print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return 0
    table = Table(*titles, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    Console().print(table, highlight=False, markup=False)
    return 0


def describe(name: str, kind: type[Strategy]) -> tuple[str, str, str, str]:
    """Return name, first sentence, and the Remembers and Asks paragraphs of a class docstring."""
    text = inspect.getdoc(kind) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return (name, first, _paragraph(text, "Remembers"), _paragraph(text, "Asks of the model"))


def _paragraph(text: str, title: str) -> str:
    found = re.search(rf"\*\*{title}\*\*[:.]?\s*(.*?)(?=\n\n|\*\*|\Z)", text, re.DOTALL)
    return " ".join(found.group(1).split()) if found else "-"
