"""The three cards over the emoji shards: by group, by year, by language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcl.data.builders.card import card_counts, card_task, card_text
from mmcl.data.builders.emoji_table import LANGUAGES, Emoji
from mmcl.data.builders.shards import ShardPlan

CARDS = ("emoji_groups.yaml", "emoji_years.yaml", "emoji_languages.yaml")
TEMPLATES = ("an emoji of {}.", "a picture of {}.", "the {} emoji.")

Cells = dict[tuple[str, int], tuple[ShardPlan, ShardPlan]]
"""From (group, year) to its train and its test shard."""

_LICENCES = (
    ("NotoColor", "SIL Open Font License 1.1 (Noto Emoji, Google)"),
    ("Twitter", "CC BY 4.0 (Twemoji graphics)"),
)
_SOURCE = (
    "names: Unicode CLDR by the emoji package; groups and years: emoji-test.txt of Emoji 15.0 "
    "(Unicode licence); pictures: "
)


_ABOUT = {
    "emoji_groups": "Emoji pictures, one group of Unicode's in every task.",
    "emoji_years": "Emoji pictures in the order in which Unicode took them up.",
    "emoji_languages": "Emoji pictures and their names, one language in every task.",
}


def card_texts(
    classes: Mapping[str, Emoji], cells: Cells, hashes: Mapping[str, str], made_by: str, font: str
) -> dict[str, str]:
    """Write the three cards; all of them name the same shards and the same list of classes.

    Args:
        classes: from the English name of every class to its emoji, in the order of the labels.
        cells: the shards.
        hashes: from shard to sha256.
        made_by: the command, for the header.
        font: file name of the font.

    Returns:
        From card file name to its text.
    """
    tasks = {
        "emoji_groups": ("class", "classify", _group_tasks(classes, cells)),
        "emoji_years": ("class", "classify", _year_tasks(classes, cells)),
        "emoji_languages": ("domain", "caption", _language_tasks(cells)),
    }
    licence = _licence_of(font)
    samples = sum(train.count + test.count for train, test in cells.values())
    header = (
        f"Made by: {made_by}",
        f"Licence: {licence}",
        f"Samples: {samples} of {len(classes)} classes in {2 * len(cells)} shards (shared by "
        f"{', '.join(CARDS)})",
    )
    texts = {}
    for name, (scenario, kind, own) in tasks.items():
        card = {
            "name": name,
            "scenario": scenario,
            "description": f"{_ABOUT[name]} Each picture has its own place, size, angle and "
            "background; train and test pictures show the same glyphs.",
            "licence": licence,
            "source": f"{_SOURCE}{font}",
            "classes": list(classes),
            "templates": list(TEMPLATES),
            "kind": kind,
            "stage": "cft",
            "tasks": own,
            "probes": [],
            "hashes": dict(hashes),
            "counts": card_counts([plan for pair in cells.values() for plan in pair]),
        }
        texts[f"{name}.yaml"] = card_text(card, header)
    return texts


def _licence_of(font: str) -> str:
    for start, licence in _LICENCES:
        if font.startswith(start):
            return licence
    return f"that of the font {font}: look it up before you pass the pictures on"


def _group_tasks(classes: Mapping[str, Emoji], cells: Cells) -> list[dict[str, Any]]:
    groups = list(dict.fromkeys(group for group, _ in cells))
    return [
        _class_task(group, classes, {cell: cells[cell] for cell in cells if cell[0] == group})
        for group in groups
    ]


def _year_tasks(classes: Mapping[str, Emoji], cells: Cells) -> list[dict[str, Any]]:
    tasks = []
    for years in merge_years([one.year for one in classes.values()]):
        name = "-".join(str(year) for year in dict.fromkeys((years[0], years[-1])))
        own = {cell: cells[cell] for cell in cells if cell[1] in years}
        tasks.append(_class_task(name, classes, own))
    return tasks


def merge_years(years: Sequence[int]) -> list[list[int]]:
    """Put years together, in order, until none has fewer than half an even share of the classes.

    Args:
        years: the year of every class, in any order.

    Returns:
        Lists of consecutive years, oldest first.
    """
    distinct = sorted(set(years))
    enough = len(years) / (2 * len(distinct))
    merged: list[list[int]] = [[]]
    for year in distinct:
        if sum(one in merged[-1] for one in years) >= enough:
            merged.append([])
        merged[-1].append(year)
    if len(merged) > 1 and sum(one in merged[-1] for one in years) < enough:
        last = merged.pop()
        merged[-1] += last
    return merged


def _language_tasks(cells: Cells) -> list[dict[str, Any]]:
    train, test = zip(*cells.values(), strict=True)
    return [
        card_task(language, train, test, text="txt" if language == "en" else f"{language}.txt")
        for language in LANGUAGES
    ]


def _class_task(name: str, classes: Mapping[str, Emoji], own: Cells) -> dict[str, Any]:
    train, test = zip(*own.values(), strict=True)
    names = [name for name, one in classes.items() if (one.group, one.year) in own]
    return card_task(name, train, test, classes=names)
