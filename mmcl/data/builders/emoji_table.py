"""Which emoji there are, to which group and year they belong, and what people call them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

import emoji

GROUPS = {
    "Smileys & Emotion": "smileys",
    "People & Body": "people",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Objects": "objects",
    "Symbols": "symbols",
    "Flags": "symbols",
}
"""From Unicode's group to our task; the five flags of one code point are too few for their own."""

LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "id", "ru", "ja", "zh")
"""ISO 639-1 codes, in the order of the tasks."""

_STRAIGHT = str.maketrans({"_": " ", "’": "'", "“": '"', "”": '"'})


@dataclass(frozen=True)
class Emoji:
    """One emoji of one code point.

    Args:
        text: the character, followed by U+FE0F where Unicode asks for it.
        group: our name of its group, a value of `GROUPS`.
        subgroup: Unicode's subgroup, for example ``animal-bug``.
        version: of Emoji in which it came, for example ``3.0``.
        year: in which that version was published.
    """

    text: str
    group: str
    subgroup: str
    version: str
    year: int

    @property
    def slug(self) -> str:
        """The code point in hex, for example ``1f98b``."""
        return f"{ord(self.text[0]):x}"


def read_table() -> list[Emoji]:
    """Read the table of the package: every fully qualified emoji of one code point up to Emoji 15.0.

    Returns:
        The emoji in Unicode's order.
    """
    file = resources.files("mmcl.data.builders") / "emoji_table.tsv"
    lines = [
        line
        for line in file.read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    table = []
    for line in lines[1:]:
        code_points, group, subgroup, version, year = line.split("\t")
        text = "".join(chr(int(point, 16)) for point in code_points.split())
        table.append(Emoji(text, GROUPS[group], subgroup, version, int(year)))
    return table


def choose(table: Iterable[Emoji], per_group: int | None) -> list[Emoji]:
    """Take at most so many emoji of every group, as different as they can be.

    The years of a group take turns, and within a year its subgroups do, so that every year has its
    share and a group is not twelve clock faces. The choice is the same for every seed.

    Args:
        table: emoji in Unicode's order.
        per_group: classes per group, at least 1; None takes all.

    Returns:
        The chosen ones by group, inside a group by year, inside a year in Unicode's order.

    Raises:
        ValueError: if ``per_group`` is less than 1.
    """
    if per_group is not None and per_group < 1:
        raise ValueError(f"per_group is {per_group}: give 1 or more, or None for every emoji")
    table = list(table)
    turns = _turns(table, lambda one: (one.group, one.year, one.subgroup))
    by_turn = sorted(range(len(table)), key=lambda place: (turns[place], place))
    year_turns = _turns([table[place] for place in by_turn], lambda one: (one.group, one.year))
    rounds = sorted(zip(year_turns, by_turn, strict=True), key=lambda pair: (pair[0], table[pair[1]].year))
    chosen = []
    for group in dict.fromkeys(GROUPS.values()):
        places = [place for _, place in rounds if table[place].group == group][:per_group]
        chosen += [table[place] for place in sorted(places, key=lambda place: (table[place].year, place))]
    return chosen
