"""``mmcl strategies``: what exists, what it remembers, what it asks of the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

from mmcl.commands.words import CommandParser, UnknownWords
from mmcl.core import Strategy
from mmcl.lightning.mistakes import unknown_strategy
from mmcl.strategies import discover

_GROUPS = {
    "any": "with any model",
    "answers": "with a model that answers in words (mmcl.models.ImageTextToText)",
    "classes": "with a model that compares classes (mmcl.models.OpenCLIP)",
}


class Described(NamedTuple):
    """A strategy in a few words.

    Attributes:
        name: of the class.
        model: "any", or which kind it needs: one that "answers" in words, or gives "classes"
            scores.
        does: first sentence of the docstring.
        remembers: first sentence of that paragraph.
        asks: of the model, the whole paragraph.
    """

    name: str
    model: str
    does: str
    remembers: str
    asks: str


def main(argv: Sequence[str]) -> int:
    """List every strategy, a line each; with a name, everything about that one."""
    parser = CommandParser(prog="mmcl strategies", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="of one strategy")
    parser.add_argument("--markdown", action="store_true", help="as a table for a document")
    given = parser.parse_args(argv)
    known = discover()
    if given.name is not None:
        if given.name not in known:
            raise UnknownWords(unknown_strategy(given.name))
        print(_whole(given.name, known[given.name]))
        return 0
    rows = [describe(name, kind) for name, kind in known.items()]
    if given.markdown:
        titles = ("strategy", "model", "what it does", "remembers", "asks of the model")
        print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
        for row in rows:
            print("| " + " | ".join(row) + " |")
        return 0
    width = max(len(row.name) for row in rows)
    for model, title in _GROUPS.items():
        print(f"{title}:")
        for row in rows:
            if row.model == model:
                print(f"  {row.name:<{width}}  {row.does.replace('``', '')}")
    print("mmcl strategies NAME shows what one remembers, asks of the model and is given")
    return 0


def describe(name: str, kind: type[Strategy]) -> Described:
    """Describe a strategy by the docstring of its class."""
    text = inspect.getdoc(kind) or ""
    asks = _paragraph(text, "Asks of the model")
    first = _sentence(" ".join(text.split("\n\n")[0].split()))
    return Described(name, _model(asks), first, _sentence(_paragraph(text, "Remembers")), asks)


def _model(asks: str) -> str:
    """Tell from what a strategy asks which models have it."""
    if "``answer``" in asks or "``linears" in asks:
        return "answers"
    return "classes" if "class scores" in asks else "any"


def _whole(name: str, kind: type[Strategy]) -> str:
    text = (inspect.getdoc(kind) or "").replace("``", "").replace("**", "")
    return f"{kind.__module__}.{name}\n\n{text}"


def _sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text, maxsplit=1)[0]


def _paragraph(text: str, title: str) -> str:
    found = re.search(rf"\*\*{title}\*\*[:.]?\s*(.*?)(?=\n\n|\*\*|\Z)", text, re.DOTALL)
    return " ".join(found.group(1).split()) if found else "-"
