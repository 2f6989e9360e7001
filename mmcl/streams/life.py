"""The stream `life`: stages of a model's life in one card, for the built-in tiny CLIP.

Captions of emoji by the years in which they entered Unicode (cpt), captions of handwritten digits
under stripes (dap), their ten classes in two tasks (cft); drawn glyphs, on which the tiny CLIP was
trained, are the general source and the probes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL

from mmcl.data.shards.stream_writer import Progress, Sample, ShardPlan, card_task
from mmcl.streams.digits import CLASSES, LICENSE, TEMPLATES, plan_scans, striped
from mmcl.streams.emoji import EmojiClass, choose_classes, emoji_png, font_license
from mmcl.streams.emoji_table import EmojiFont, find_font
from mmcl.streams.glyphs import EVAL_ONLY, FACES, draw_any, plan_shard
from mmcl.streams.stream_files import write_stream

YEARS = ((2010, 2015), (2016, 2018), (2019, 2022))
"""First and last year of each task of continual pre-training."""
PER_GROUP = 24
"""Emoji of each of the eight groups."""
SIZES = {"train": 8, "test": 3}
"""Images of an emoji."""
GENERAL, PROBE = 2000, 300
"""Images of the general source and of each probe."""
RECIPE = 1  # counts up whenever the same seed would give other bytes

Planned = tuple[list[dict[str, Any]], list[ShardPlan]]
"""Entries of a card, and their shards."""


def build(
    folder: Path, font: Path | None = None, seed: int = 0, progress: Progress | None = None
) -> Path:
    """Build `life`: three tasks of emoji captions, one of captioned scans, two of classes.

    Args:
        folder: output folder of shards and card.
        font: a color-emoji font; None looks for one on this machine.
        seed: of everything that is drawn, and of the split of the scans.
        progress: called with (samples done, samples in total).

    Returns:
        The path of ``life.yaml``.

    Raises:
        FileNotFoundError: if there is no such font; the message says what to install.
    """
    emoji_font = EmojiFont(font or find_font())
    years, emoji = _plan_years(choose_classes(emoji_font, PER_GROUP), seed)
    digits, scans = _plan_digits(seed)
    probes, drawn = _plan_probes(seed)
    general = plan_shard("general", GENERAL, partial(draw_any, FACES), seed)
    card = {
        "name": "life",
        "scenario": "domain",
        "description": "Stages of a model's life: captions of emoji by their years (cpt), captions "
        "of handwritten digits under stripes (dap), their classes in two tasks (cft). Drawn glyphs "
        "are the general source and the probes.",
        "license": f"{LICENSE}; emoji: {font_license(emoji_font.path.name)}; glyphs: CC0-1.0",
        "source": "UCI Optical Recognition of Handwritten Digits by scikit-learn; names of emoji: "
        f"Unicode CLDR by the emoji package; pictures: {emoji_font.path.name}; drawn glyphs",
        "classes": list(CLASSES),
        "templates": list(TEMPLATES),
        "task_type": "classification",
        "sources": {
            "general": {"task_type": "captioning", "shards": [general.name], "size": general.count},
        },
        "tasks": [*years, *digits],
        "eval_only": probes,
    }  # fmt: skip
    recipe = {
        "number": RECIPE,
        "seed": seed,
        "font": {"name": emoji_font.path.name, "sha256": emoji_font.sha256()},
        "emoji": version("emoji"),
        **{module.__name__: module.__version__ for module in (np, PIL, matplotlib)},
    }
    plans = [*emoji, *scans, *drawn, general]
    return write_stream("life", folder, [(card, plans)], recipe, progress)[0]


def _plan_years(classes: Sequence[EmojiClass], seed: int) -> Planned:
    tasks, plans = [], []
    for first, last in YEARS:
        name = f"emoji_{first}_{last}"
        own = [one for one in classes if first <= one.emoji.year <= last]
        pair = [
            ShardPlan(f"{name}-{split}.tar", len(own) * count, partial(_emoji, own, split, seed))
            for split, count in SIZES.items()
        ]
        tasks.append(card_task(name, pair[:1], pair[1:], stage="cpt", task_type="captioning"))
        plans += pair
    return tasks, plans


def _emoji(classes: Sequence[EmojiClass], split: str, seed: int) -> Iterator[Sample]:
    for one in classes:
        for number in range(SIZES[split]):
            yield {
                "__key__": f"{one.emoji.slug}-{split}-{number:03d}",
                "png": emoji_png(one, split, number, seed),
                "txt": f"an emoji of {one.names['en']}.",
            }


def _plan_digits(seed: int) -> Planned:
    every = plan_scans("scans", "scans", seed, set(range(10)), striped)
    tasks = [card_task("scans", every[:1], every[1:], stage="dap", task_type="captioning")]
    plans = every
    for name, labels in (("zero_to_four", range(5)), ("five_to_nine", range(5, 10))):
        pair = plan_scans(name, name, seed, set(labels), striped)
        names = [CLASSES[label] for label in labels]
        tasks.append(card_task(name, pair[:1], pair[1:], stage="cft", classes=names))
        plans = [*plans, *pair]
    return tasks, plans


def _plan_probes(seed: int) -> Planned:
    entries, plans = [], []
    for name, (classes, templates, draw) in EVAL_ONLY.items():
        plan = plan_shard(f"probe-{name}", PROBE, draw, seed, classes)
        entries.append({
            "name": f"drawn_{name}", "ability": "general", "classes": list(classes),
            "templates": list(templates), "test": [plan.name], "test_size": plan.count,
        })  # fmt: skip
        plans.append(plan)
    return entries, plans
