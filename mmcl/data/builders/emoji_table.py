"""Which emoji there are, to which group and year they belong, and what people call them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest

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
    """Read the table of the package: every emoji of one code point up to Emoji 15.0.

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


def choose(table: Sequence[Emoji], per_group: int | None) -> list[Emoji]:
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
    chosen: list[Emoji] = []
    for group in dict.fromkeys(GROUPS.values()):
        members = sorted((one for one in table if one.group == group), key=lambda one: one.year)
        years = [_take_turns(_parted(year, "subgroup")) for year in _parted(members, "year")]
        kept = set(_take_turns(years)[:per_group])
        chosen += [one for one in members if one in kept]
    return chosen


def _parted(table: Sequence[Emoji], field: str) -> list[list[Emoji]]:
    """Part a list by the value of a field; parts in the order of their first member."""
    parts: dict[object, list[Emoji]] = {}
    for one in table:
        parts.setdefault(getattr(one, field), []).append(one)
    return list(parts.values())


def _take_turns(lists: Sequence[Sequence[Emoji]]) -> list[Emoji]:
    """Deal from the lists in turn: the first of each, then the second of each."""
    return [one for turn in zip_longest(*lists) for one in turn if one is not None]


def names_of(one: Emoji) -> dict[str, str] | None:
    """Look up what an emoji is called, in the words of CLDR as the `emoji` package has them.

    Args:
        one: any emoji of the table.

    Returns:
        From each of `LANGUAGES` to the name, such as ``red apple``; None if one language has none.
    """
    emoji.config.load_language(list(LANGUAGES))  # a second call costs nothing
    entry = emoji.EMOJI_DATA.get(one.text, {})
    names = {language: _clean(entry.get(language, "")) for language in LANGUAGES}
    return names if all(names.values()) else None


def _clean(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip(":").translate(_STRAIGHT)).strip()
