"""The streams `digits` and `digits_domains`: real handwriting, learned class by class or look by look.

Data: scikit-learn's `load_digits`, the 1,797 scans (8 x 8 pixels, 17 grey levels) of the test part
of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, CC BY 4.0).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageChops, ImageOps
from sklearn.datasets import load_digits

from mmcl.data.builders.card import card_task, card_text
from mmcl.data.builders.shards import Progress, Sample, ShardPlan, build_stream

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TASKS = tuple((CLASSES[first], CLASSES[first + 1]) for first in range(0, 10, 2))
TEMPLATES = (
    "a photo of the digit {}.",
    "the handwritten number {}.",
    "a scan of a handwritten {}.",
)
LICENCE = "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)"
SOURCE = (
    "E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine "
    "Learning Repository, doi:10.24432/C50P49; its test part, as scikit-learn's load_digits"
)
SPLIT = "a seeded quarter of every class is the test part; writers are not known, so they may meet"
TEST_SHARE = 0.25
DOMAIN_PIXELS = 32


def build(folder: Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build `digits`: five tasks of two classes, the scans as they are (8 x 8 grey PNG).

    Args:
        folder: where shards and card will lie.
        seed: of the split.
        progress: told (samples done, samples in all).

    Returns:
        The path of ``digits.yaml``.
    """
    pictures, labels = _scans()
    split = _split(labels, seed)
    plans: dict[tuple[str, str], ShardPlan] = {}
    for task in TASKS:
        for part, chosen in split.items():
            wanted = [i for i in chosen if CLASSES[labels[i]] in task]
            samples = partial(_samples, wanted, pictures, labels, "digits", lambda scan, _: scan)
            name = f"{'-'.join(task)}-{part}.tar"
            plans["-".join(task), part] = ShardPlan(name, len(wanted), samples)
    tasks = [
        card_task("-".join(task), [plans["-".join(task), "train"]],
                  [plans["-".join(task), "test"]], classes=list(task))
        for task in TASKS
    ]  # fmt: skip
    description = f"Handwritten digits, two new classes a task. Split: {SPLIT}."
    return _finish(folder, "digits", "class", description, tasks, list(plans.values()), seed,
                   progress)  # fmt: skip


def build_domains(folder: Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build `digits_domains`: all ten classes in each of five looks (32 x 32 RGB PNG).

    The looks are clean, inverted (blue ink on yellow paper), noisy, rotated by 40 degrees, and
    striped. Every look holds every scan; a scan is in the train part of all looks or of none.

    Args:
        folder: where shards and card will lie.
        seed: of the split, of the noise and of the place of the stripes.
        progress: told (samples done, samples in all).

    Returns:
        The path of ``digits_domains.yaml``.
    """
    pictures, labels = _scans()
    split = _split(labels, seed)
    plans: list[ShardPlan] = []
    tasks = []
    for number, (domain, look) in enumerate(DOMAINS.items()):
        draw = partial(_domain_picture, look, seed, number)
        parts = [
            ShardPlan(
                f"{domain}-{part}.tar",
                len(chosen),
                partial(_samples, chosen, pictures, labels, domain, draw),
            )
            for part, chosen in split.items()
        ]
        plans += parts
        tasks.append(card_task(domain, parts[:1], parts[1:]))
    description = (
        "The same handwritten digits in five looks: clean, inverted (blue ink on yellow paper), "
        f"noisy (normal, deviation 70 of 255), rotated by 40 degrees, striped. Split: {SPLIT}."
    )
    return _finish(folder, "digits_domains", "domain", description, tasks, plans, seed, progress)
