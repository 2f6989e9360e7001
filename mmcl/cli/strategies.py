"""``mmcl strategies``: list of strategies, what each stores and asks of the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.core import Strategy
from mmcl.lightning.config.config_errors import unknown_strategy
from mmcl.strategies import discover

_GROUPS = {
    "any": "with any model",
    "answers": "with a generative model (mmcl.models.ImageTextToText)",
    "classes": "with a model of class scores (mmcl.models.OpenCLIP)",
}
_CELLS = {"any": ("✓", "✓"), "answers": ("", "✓"), "classes": ("✓", "")}
_MAX_STORES = 90


class StrategyDescription(NamedTuple):
    """Description of a strategy from the docstrings of its class and its module.

    Attributes:
        name: class name.
        model: kind of model: "any", "answers" for a generative one, "classes" for class scores.
        summary: first sentence of the docstring.
        stores: first sentence of the paragraph **Remembers**.
        asks: paragraph **Asks of the model**.
        year: of the paper, "" if there is none.
        paper: markdown link to the paper, "" if there is none.
    """

    name: str
    model: str
    summary: str
    stores: str
    asks: str
    year: str
    paper: str


def main(argv: Sequence[str]) -> int:
    """List all strategies, a line each, or print the docstring of one."""
    parser = CommandParser(prog="mmcl strategies", description=main.__doc__)
    parser.add_argument("name", nargs="?", help="class name of a strategy")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    parser.add_argument("--long", action="store_true", help="of --markdown: the whole descriptions")
    given = parser.parse_args(argv)
    if given.long and not given.markdown:
        parser.error("--long is an option of the markdown table: add --markdown")
    known = discover()
    if given.name is not None:
        if given.name not in known:
            raise UsageError(unknown_strategy(given.name))
        cls = known[given.name]
        text = (inspect.getdoc(cls) or "").replace("``", "").replace("**", "")
        print(f"{cls.__module__}.{given.name}\n\n{text}")
        return 0
    rows = [describe(name, cls) for name, cls in known.items()]
    if given.long:  # the table of docs/strategies.md
        titles = "strategy, what it does, stores, asks of the model"
        print(_markdown(titles, [(row.name, row.summary, row.stores, row.asks) for row in rows]))
        return 0
    if given.markdown:  # the table of the README
        print(_markdown("strategy, year, paper, CLIP, LLaVA, stores", [
            (row.name, row.year, row.paper, *_CELLS[row.model], _shortened(row.stores))
            for row in rows
        ]))  # fmt: skip
        return 0
    width = max(len(row.name) for row in rows)
    for model, title in _GROUPS.items():
        print(f"{title}:")
        for row in rows:
            if row.model == model:
                print(f"  {row.name:<{width}}  {row.summary.replace('``', '')}")
    print("mmcl strategies NAME shows its arguments, what it stores and what it asks of the model")
    return 0


def describe(name: str, cls: type[Strategy]) -> StrategyDescription:
    """Return the description of a strategy from the docstrings of its class and its module."""
    text = inspect.getdoc(cls) or ""
    asks = _paragraph(text, "Asks of the model")
    summary = _sentence(" ".join(text.split("\n\n")[0].split()))
    stores = _sentence(_paragraph(text, "Remembers"))
    year, paper = _paper(inspect.getdoc(inspect.getmodule(cls)) or "")
    model = "classes" if "class scores" in asks else "any"
    if "``generate``" in asks or "target_linears" in asks:
        model = "answers"
    return StrategyDescription(name, model, summary, stores, asks, year, paper)


def _markdown(titles: str, rows: Sequence[Sequence[str]]) -> str:
    heads = titles.split(", ")
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines).replace("``", "`")


def _shortened(text: str) -> str:
    """Return the start of a sentence, followed by "..." if details are left out."""
    plain = re.sub(r"\s*\([^()]*[a-z]{3}[^()]*\)", "", text).rstrip(".")
    start = re.split(r"[:;]", plain, maxsplit=1)[0]
    if len(start) > _MAX_STORES:
        cut = start[:_MAX_STORES]
        start = cut.rpartition(",")[0] or cut.rpartition(" ")[0]
    return start if start == plain else f"{start} ..."


def _paper(text: str) -> tuple[str, str]:
    """Return year and link from the line "Paper: Wang et al. 2022, arXiv:2112.08654."."""
    line = r"^Paper: ([^.]+?(?: et al\.)?) (\d{4}), arXiv:(\d{4}\.\d{5})"
    match = re.search(line, text, re.MULTILINE)
    if match is None:
        return "", ""
    return match[2], f"[{match[1]}](https://arxiv.org/abs/{match[3]})"


def _sentence(text: str) -> str:
    return re.split(r'(?<=\.)\s+(?=["A-Z])', text, maxsplit=1)[0]


def _paragraph(text: str, title: str) -> str:
    match = re.search(rf"\*\*{title}\*\*[:.]?\s*(.*?)(?=\n\n|\*\*|\Z)", text, re.DOTALL)
    return " ".join(match.group(1).split()) if match else "-"
