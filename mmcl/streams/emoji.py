"""The streams `emoji_groups`, `emoji_years`, `emoji_languages`: the same pictures in three orders.

Pictures come from a colour-emoji font of this machine, names from CLDR by the `emoji` package,
groups and years from Unicode (`emoji_table.tsv`). The pictures are in one train and one test shard
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

from mmcl.data.writing.card_writer import card_counts, card_task, card_text
from mmcl.data.writing.shard_writer import Progress, Sample, ShardPlan, build_stream
from mmcl.streams.emoji_table import (
    LANGUAGES,
    Emoji,
    EmojiFont,
    choose,
    find_font,
    names_of,
    read_table,
)

PIXELS = 64
FRACTION = (0.55, 0.92)
"""Range of the glyph's larger side, as a fraction of the picture's side."""
DEGREES = 25.0
"""Largest angle of rotation; angles are in [-25, 25]."""


def augment(glyph: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Put a glyph on a background, turned, sized and placed as the generator says.

    Args:
        glyph: square RGBA picture of any size.
        draw: generator of this picture alone; half of the backgrounds are one colour, half run
            from one colour to another.

    Returns:
        A 64 x 64 RGB picture with the whole glyph inside, but for corners that turn out of it.
    """
    side = round(PIXELS * draw.uniform(*FRACTION))
    angle = float(draw.uniform(-DEGREES, DEGREES))
    room = PIXELS - side
    place = int(draw.integers(room + 1)), int(draw.integers(room + 1))
    canvas = background(draw)
    small = glyph.resize((side, side), Image.Resampling.LANCZOS)
    turned = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    grown = (turned.width - side) // 2
    canvas.alpha_composite(*_clipped(turned, place[0] - grown, place[1] - grown))
    return canvas.convert("RGB")


def _clipped(picture: Image.Image, left: int, top: int) -> tuple[Image.Image, tuple[int, int]]:
    """Crop what is left of or above the canvas, which `alpha_composite` refuses."""
    cut_left, cut_top = max(-left, 0), max(-top, 0)
    kept = picture.crop((cut_left, cut_top, picture.width, picture.height))
    return kept, (max(left, 0), max(top, 0))


def background(draw: np.random.Generator) -> Image.Image:
    """Draw a 64 x 64 RGBA background: one colour, or a straight run between two at any angle."""
    first, second = draw.integers(0, 256, (2, 3))
    turn = draw.uniform(0.0, 2.0 * np.pi)
    if draw.random() < 0.5:
        second = first
    steps = np.linspace(-1.0, 1.0, PIXELS)
    along = np.cos(turn) * steps[None, :] + np.sin(turn) * steps[:, None]
    fraction = ((along - along.min()) / (along.max() - along.min()))[:, :, None]
    colours = np.rint(first * (1.0 - fraction) + second * fraction).astype(np.uint8)
    return Image.fromarray(colours).convert("RGBA")


CARDS = ("emoji_groups.yaml", "emoji_years.yaml", "emoji_languages.yaml")
TEMPLATES = ("an emoji of {}.", "a picture of {}.", "the {} emoji.")

Cells = dict[tuple[str, int], tuple[ShardPlan, ShardPlan]]
"""From (group, year) to its train and its test shard."""

_LICENSES = (
    ("NotoColor", "SIL Open Font License 1.1 (Noto Emoji, Google)"),
    ("Twitter", "CC BY 4.0 (Twemoji graphics)"),
)
_SOURCE = (
    "names: Unicode CLDR by the emoji package; groups and years: emoji-test.txt of Emoji 15.0 "
    "(Unicode license); pictures: "
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
        "emoji_groups": ("class", "classification", _group_tasks(classes, cells)),
        "emoji_years": ("class", "classification", _year_tasks(classes, cells)),
        "emoji_languages": ("domain", "captioning", _language_tasks(cells)),
    }
    license = _license_of(font)
    samples = sum(train.count + test.count for train, test in cells.values())
    header = (
        f"Made by: {made_by}",
        f"License: {license}",
        f"Samples: {samples} of {len(classes)} classes in {2 * len(cells)} shards (shared by "
        f"{', '.join(CARDS)})",
    )
    texts = {}
    for name, (scenario, task_type, own) in tasks.items():
        card = {
            "name": name,
            "scenario": scenario,
            "description": f"{_ABOUT[name]} Each picture has its own place, size, angle and "
            "background; train and test pictures show the same glyphs.",
            "license": license,
            "source": f"{_SOURCE}{font}",
            "classes": list(classes),
            "templates": list(TEMPLATES),
            "task_type": task_type,
            "stage": "cft",
            "tasks": own,
            "eval_only": [],
            "hashes": dict(hashes),
            "counts": card_counts([plan for pair in cells.values() for plan in pair]),
        }
        texts[f"{name}.yaml"] = card_text(card, header)
    return texts


def _license_of(font: str) -> str:
    for start, license in _LICENSES:
        if font.startswith(start):
            return license
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
    """Merge consecutive years until each group has at least half an even fraction of the classes.

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
        card_task(
            language, train, test, text_field="txt" if language == "en" else f"{language}.txt"
        )
        for language in LANGUAGES
    ]


def _class_task(name: str, classes: Mapping[str, Emoji], own: Cells) -> dict[str, Any]:
    train, test = zip(*own.values(), strict=True)
    names = [name for name, one in classes.items() if (one.group, one.year) in own]
    return card_task(name, train, test, classes=names)


SPLITS = ("train", "test")
RECIPE = 1  # counts up whenever the same seed would give other bytes


@dataclass(frozen=True)
class _Class:
    """A class of the stream: its label, its emoji, its picture, its names by language."""

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
        folder: output folder of shards and cards.
        font: a colour-emoji font; None looks for one on this machine.
        seed: of place, size, angle and background.
        per_group: classes per group at most; None takes every emoji that the font has.
        train_per_class: pictures of every class to learn from, at least 1.
        test_per_class: pictures of every class to score on, at least 1.
        progress: called with (samples done, samples in total).

    Returns:
        The paths of the cards: groups, years, languages.

    Raises:
        FileNotFoundError: if there is no such font; the message says what to install.
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
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"{split}_per_class is {size}: give 1 or more pictures per class")


def _recipe(
    font: EmojiFont, seed: int, per_group: int | None, sizes: dict[str, int]
) -> dict[str, Any]:
    """Return all that the pictures depend on."""
    return {
        "number": RECIPE,
        "seed": seed,
        "per_group": per_group,
        **{f"{split}_per_class": size for split, size in sizes.items()},
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
                f"{group}-{year}-{split}.tar",
                len(own) * sizes[split],
                partial(_samples, own, split, sizes[split], seed),
            )
            for split in SPLITS
        )
        cells[group, year] = train, test
    return cells


def _samples(classes: Sequence[_Class], split: str, size: int, seed: int) -> Iterator[Sample]:
    for one in classes:
        for number in range(size):
            point = ord(one.emoji.text[0])
            # Seeded by the emoji, not its label: other choices leave its pictures as they are.
            draw = np.random.default_rng([seed, point, SPLITS.index(split), number])
            png = io.BytesIO()
            augment(one.glyph, draw).save(png, "PNG")
            captions = {f"{language}.txt": one.names[language] for language in LANGUAGES[1:]}
            yield {
                "__key__": f"{one.emoji.slug}-{split}-{number:03d}",
                "png": png.getvalue(),
                "cls": str(one.label),
                "txt": one.names["en"],
                **captions,
            }
