"""The streams `emoji_groups`, `emoji_years`, `emoji_languages`: the same pictures in three orders.

Pictures come from a colour-emoji font of this machine, names from CLDR by the `emoji` package,
groups and years from Unicode (`emoji_table.tsv`). The pictures lie in one train and one test shard
for each cell of (group, year), and the three cards name these shards in their own order.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from mmcl.data.builders.emoji_cards import CARDS, Cells, card_texts
from mmcl.data.builders.emoji_font import EmojiFont, find_font
from mmcl.data.builders.emoji_pictures import augment
from mmcl.data.builders.emoji_table import LANGUAGES, Emoji, choose, names_of, read_table
from mmcl.data.builders.shards import Progress, Sample, ShardPlan, build_stream

PARTS = ("train", "test")
RECIPE = 1  # counts up whenever the same seed would give other bytes


@dataclass(frozen=True)
class _Class:
    """A class of the stream: its emoji, its picture, its names by language, its place."""

    label: int
    emoji: Emoji
    glyph: Image.Image
    names: Mapping[str, str]


def build(
    folder: Path,
    font: Path | None = None,
    seed: int = 0,
    per_group: int | None = 24,
    train_per_class: int = 8,
    test_per_class: int = 3,
    progress: Progress | None = None,
) -> list[Path]:
    """Build the pictures once and the three cards over them.

    By default 8 groups of 24 classes with 8 + 3 pictures each: 2,112 pictures of 64 x 64.

    Args:
        folder: where shards and cards will lie.
        font: a colour-emoji font; None looks for one on this machine.
        seed: of place, size, angle and background.
        per_group: classes per group at most; None takes every emoji that the font has.
        train_per_class: pictures of every class to learn from, at least 1.
        test_per_class: pictures of every class to score on, at least 1.
        progress: told (samples done, samples in all).

    Returns:
        The paths of the cards: groups, years, languages.

    Raises:
        FileNotFoundError: if there is no such font; the sentence says what to install.
        ValueError: if a count is below 1, or the font has no coloured emoji.
    """
    sizes = {"train": train_per_class, "test": test_per_class}
    _expect_pictures(sizes)
    emoji_font = EmojiFont(font if font is not None else find_font())
    classes = _choose_classes(emoji_font, per_group)
    cells = _plan_cells(classes, sizes, seed)
    return build_stream(
        folder,
        "emoji",
        [plan for plans in cells.values() for plan in plans],
        CARDS,
        partial(
            card_texts,
            {one.names["en"]: one.emoji for one in classes},
            cells,
            made_by=f"mmcl data build emoji --seed {seed} (per_group={per_group}, "
            f"train_per_class={train_per_class}, test_per_class={test_per_class})",
            font=emoji_font.path.name,
        ),
        recipe=_recipe(emoji_font, seed, per_group, sizes),
        progress=progress,
    )


def _expect_pictures(sizes: dict[str, int]) -> None:
    for part, size in sizes.items():
        if size < 1:
            raise ValueError(f"{part}_per_class is {size}: give 1 or more pictures per class")


def _recipe(
    font: EmojiFont, seed: int, per_group: int | None, sizes: dict[str, int]
) -> dict[str, Any]:
    """Return all that the pictures depend on."""
    return {
        "number": RECIPE,
        "seed": seed,
        "per_group": per_group,
        **{f"{part}_per_class": size for part, size in sizes.items()},
        "font": {"name": font.path.name, "sha256": font.sha256()},
        "emoji": version("emoji"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def _choose_classes(font: EmojiFont, per_group: int | None) -> list[_Class]:
    """Choose among the emoji that have a picture of their own, and one name in every language."""
    found: dict[Emoji, tuple[Image.Image, dict[str, str]]] = {}
    seen: set[bytes | str] = set()
    for one in read_table():
        glyph, names = font.picture(one.text), names_of(one)
        if glyph is None or names is None or {glyph.tobytes(), names["en"]} & seen:
            continue
        seen |= {glyph.tobytes(), names["en"]}
        found[one] = glyph, names
    chosen = choose(list(found), per_group)
    return [_Class(label, one, *found[one]) for label, one in enumerate(chosen)]


def _plan_cells(classes: Sequence[_Class], sizes: Mapping[str, int], seed: int) -> Cells:
    members: dict[tuple[str, int], list[_Class]] = {}
    for one in classes:
        members.setdefault((one.emoji.group, one.emoji.year), []).append(one)
    cells: Cells = {}
    for (group, year), own in members.items():
        train, test = (
            ShardPlan(
                f"{group}-{year}-{part}.tar",
                len(own) * sizes[part],
                partial(_samples, own, part, sizes[part], seed),
            )
            for part in PARTS
        )
        cells[group, year] = train, test
    return cells


def _samples(classes: Sequence[_Class], part: str, size: int, seed: int) -> Iterator[Sample]:
    for one in classes:
        for number in range(size):
            point = ord(one.emoji.text[0])
            # Seeded by the emoji, not its label: other choices leave its pictures as they are.
            draw = np.random.default_rng([seed, point, PARTS.index(part), number])
            png = io.BytesIO()
            augment(one.glyph, draw).save(png, "PNG")
            captions = {f"{language}.txt": one.names[language] for language in LANGUAGES[1:]}
            yield {
                "__key__": f"{one.emoji.slug}-{part}-{number:03d}",
                "png": png.getvalue(),
                "cls": str(one.label),
                "txt": one.names["en"],
                **captions,
            }
