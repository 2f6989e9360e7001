"""The streams `emoji_groups`, `emoji_years`, `emoji_languages`: the same images in three orders.

Images come from a color-emoji font of this machine, names from CLDR by the `emoji` package,
groups and years from Unicode (`emoji_table.tsv`). The images are in one train and one test shard
for each cell of (group, year), and the three cards name these shards in their own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from mmcl.data.shards.stream_writer import Progress, Sample, ShardPlan, card_task
from mmcl.streams.emoji_table import (
    LANGUAGES,
    Emoji,
    EmojiFont,
    choose,
    find_font,
    names_of,
    read_emoji,
)
from mmcl.streams.stream_files import Card, png_bytes, write_stream

PIXELS = 64
FRACTION = (0.55, 0.92)
"""Range of the glyph's larger side, as a fraction of the image's side."""
DEGREES = 25.0
"""Largest angle of rotation; angles are in [-25, 25]."""


def augment(glyph: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Put a glyph on a background, turned, sized and placed as the generator says.

    Args:
        glyph: square RGBA image of any size.
        draw: generator of this image alone; half of the backgrounds are one color, half run
            from one color to another.

    Returns:
        A 64 x 64 RGB image with the whole glyph inside, but for corners that turn out of it.
    """
    side = round(PIXELS * draw.uniform(*FRACTION))
    angle = float(draw.uniform(-DEGREES, DEGREES))
    room = PIXELS - side
    place = int(draw.integers(room + 1)), int(draw.integers(room + 1))
    canvas = background(draw)
    small = glyph.resize((side, side), Image.Resampling.LANCZOS)
    turned = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    grown = (turned.width - side) // 2
    left, top = place[0] - grown, place[1] - grown
    # `alpha_composite` refuses what is left of or above the canvas.
    inside = turned.crop((max(-left, 0), max(-top, 0), turned.width, turned.height))
    canvas.alpha_composite(inside, (max(left, 0), max(top, 0)))
    return canvas.convert("RGB")


def background(draw: np.random.Generator) -> Image.Image:
    """Draw a 64 x 64 RGBA background: one color, or a straight run between two at any angle."""
    first, second = draw.integers(0, 256, (2, 3))
    turn = draw.uniform(0.0, 2.0 * np.pi)
    if draw.random() < 0.5:
        second = first
    steps = np.linspace(-1.0, 1.0, PIXELS)
    along = np.cos(turn) * steps[None, :] + np.sin(turn) * steps[:, None]
    fraction = ((along - along.min()) / (along.max() - along.min()))[:, :, None]
    colors = np.rint(first * (1.0 - fraction) + second * fraction).astype(np.uint8)
    return Image.fromarray(colors).convert("RGBA")


TEMPLATES = ("an emoji of {}.", "a picture of {}.", "the {} emoji.")

Cell = tuple[str, int]
"""Group and year."""
Cells = dict[Cell, tuple[ShardPlan, ShardPlan]]
"""Cell -> its train and its test shard."""

_LICENSES = (
    ("NotoColor", "SIL Open Font License 1.1 (Noto Emoji, Google)"),
    ("Twitter", "CC BY 4.0 (Twemoji graphics)"),
)
_SOURCE = (
    "names: Unicode CLDR by the emoji package; groups and years: emoji-test.txt of Emoji 15.0 "
    "(Unicode license); pictures: "
)


_SHIFTS = {"emoji_years": "temporal", "emoji_languages": "language"}
_ABOUT = {
    "emoji_groups": "Emoji pictures, one group of Unicode's in every task.",
    "emoji_years": "Emoji pictures in the order in which Unicode took them up.",
    "emoji_languages": "Emoji pictures and their names, one language in every task.",
}
CARDS = tuple(f"{name}.yaml" for name in _ABOUT)


def font_license(font: str) -> str:
    """Return the license of a font's images by its file name, or a sentence that it is unknown."""
    unknown = f"that of the font {font}: look it up before you pass the pictures on"
    return next((text for start, text in _LICENSES if font.startswith(start)), unknown)


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


def _class_tasks(
    tasks: Mapping[str, Sequence[Cell]], classes: Mapping[str, Emoji], cells: Cells
) -> list[dict[str, Any]]:
    """Describe tasks by the cells of each; a task's classes are those of its cells."""
    entries = []
    for task, own in tasks.items():
        train, test = zip(*(cells[cell] for cell in own), strict=True)
        names = [name for name, one in classes.items() if (one.group, one.year) in own]
        entries.append(card_task(task, train, test, classes=names))
    return entries


SPLITS = ("train", "test")
RECIPE = 1  # counts up whenever the same seed would give other bytes


@dataclass(frozen=True)
class EmojiClass:
    """A class of the stream: its label, its emoji, its image, its names by language."""

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
    """Build the images once and the three cards over them.

    By default 8 groups of 24 classes with 8 + 3 images each: 2,112 images of 64 x 64.

    Args:
        folder: output folder of shards and cards.
        font: a color-emoji font; None looks for one on this machine.
        seed: of place, size, angle and background.
        per_group: classes per group at most; None takes every emoji that the font has.
        train_per_class: images of every class to learn from, at least 1.
        test_per_class: images of every class to score on, at least 1.
        progress: called with (samples done, samples in total).

    Returns:
        The paths of the cards: groups, years, languages.

    Raises:
        FileNotFoundError: if there is no such font; the message says what to install.
        ValueError: if a count is below 1, or the font has no colored emoji.
    """
    sizes = {"train": train_per_class, "test": test_per_class}
    for split, size in sizes.items():
        if size < 1:
            raise ValueError(f"{split}_per_class is {size}: give 1 or more images per class")
    emoji_font = EmojiFont(font or find_font())
    classes = choose_classes(emoji_font, per_group)
    cells = _plan_cells(classes, sizes, seed)
    plans = [plan for pair in cells.values() for plan in pair]
    cards = _cards({one.names["en"]: one.emoji for one in classes}, cells, emoji_font.path.name)
    given = {"per_group": per_group, **{f"{split}_per_class": n for split, n in sizes.items()}}
    options = ", ".join(f"{key}={value}" for key, value in given.items())
    return write_stream(
        "emoji",
        folder,
        [(card, plans) for card in cards],
        _recipe(emoji_font, seed, given),
        progress,
        made_by=f"mmcl data build emoji --seed {seed} ({options})",
        samples=f"{sum(plan.count for plan in plans)} of {len(classes)} classes in {len(plans)} "
        f"shards (shared by {', '.join(CARDS)})",
    )


def _recipe(font: EmojiFont, seed: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that the images depend on."""
    return {
        "number": RECIPE,
        "seed": seed,
        **given,
        "font": {"name": font.path.name, "sha256": font.sha256()},
        "emoji": version("emoji"),
        "numpy": np.__version__,
        "pillow": PIL.__version__,
    }


def _cards(classes: Mapping[str, Emoji], cells: Cells, font: str) -> list[Card]:
    """Describe the three cards; all of them name the same shards and the same list of classes.

    Args:
        classes: from the English name of every class to its emoji, in the order of the labels.
        cells: the shards.
        font: file name of the font.
    """
    groups = {group: [cell for cell in cells if cell[0] == group] for group, _ in cells}
    years = {
        "-".join(str(year) for year in dict.fromkeys((own[0], own[-1]))): [
            cell for cell in cells if cell[1] in own
        ]
        for own in merge_years([one.year for one in classes.values()])
    }
    train, test = zip(*cells.values(), strict=True)
    fields = {language: f"{language}.txt" for language in LANGUAGES} | {"en": "txt"}
    languages = [card_task(name, train, test, text_field=field) for name, field in fields.items()]
    tasks = {
        "emoji_groups": ("class", "classification", _class_tasks(groups, classes, cells)),
        "emoji_years": ("class", "classification", _class_tasks(years, classes, cells)),
        "emoji_languages": ("domain", "captioning", languages),
    }
    return [
        {
            "name": name,
            "scenario": scenario,
            **({"shift": _SHIFTS[name]} if name in _SHIFTS else {}),
            "description": f"{_ABOUT[name]} Each picture has its own place, size, angle and "
            "background; train and test pictures show the same glyphs.",
            "license": font_license(font),
            "source": f"{_SOURCE}{font}",
            "classes": list(classes),
            "templates": list(TEMPLATES),
            "task_type": task_type,
            "stage": "cft",
            "tasks": own,
        }
        for name, (scenario, task_type, own) in tasks.items()
    ]


def choose_classes(font: EmojiFont, per_group: int | None) -> list[EmojiClass]:
    """Choose among the emoji that have an image of their own, and one name in every language."""
    found: dict[Emoji, tuple[Image.Image, dict[str, str]]] = {}
    seen: set[bytes | str] = set()
    for one in read_emoji():
        glyph, names = font.image(one.text), names_of(one)
        if glyph is None or names is None or {glyph.tobytes(), names["en"]} & seen:
            continue
        seen |= {glyph.tobytes(), names["en"]}
        found[one] = glyph, names
    chosen = choose(list(found), per_group)
    return [EmojiClass(label, one, *found[one]) for label, one in enumerate(chosen)]


def _plan_cells(classes: Sequence[EmojiClass], sizes: Mapping[str, int], seed: int) -> Cells:
    members: dict[tuple[str, int], list[EmojiClass]] = {}
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


def _samples(classes: Sequence[EmojiClass], split: str, size: int, seed: int) -> Iterator[Sample]:
    for one in classes:
        for number in range(size):
            captions = {f"{language}.txt": one.names[language] for language in LANGUAGES[1:]}
            yield {
                "__key__": f"{one.emoji.slug}-{split}-{number:03d}",
                "png": emoji_png(one, split, number, seed),
                "cls": str(one.label),
                "txt": one.names["en"],
                **captions,
            }


def emoji_png(one: EmojiClass, split: str, number: int, seed: int) -> bytes:
    """Return one image of an emoji as PNG; another one for each split and number."""
    # Seeded by the emoji, not its label: other choices leave its images as they are.
    draw = np.random.default_rng([seed, ord(one.emoji.text[0]), SPLITS.index(split), number])
    return png_bytes(augment(one.glyph, draw))
