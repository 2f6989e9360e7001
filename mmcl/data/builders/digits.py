"""The streams `digits` and `digits_domains`: real handwriting, by class or by look.

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
from PIL import Image
from sklearn.datasets import load_digits

from mmcl.data.builders.card import card_counts, card_task, card_text
from mmcl.data.builders.digits_looks import LOOKS
from mmcl.data.builders.shards import Progress, Sample, ShardPlan, build_stream

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
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
SPLIT = (
    "Split: in every class a seeded quarter of the scans, rounded, is the test part. "
    "The data do not say who wrote a scan, so a writer may be in both parts."
)
TEST_SHARE = 0.25
RECIPE = 1  # counts up whenever the same seed would give other bytes


def build(folder: Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build `digits`: five tasks of two classes, the scans as they are (8 x 8 grey PNG).

    Args:
        folder: where shards and card will lie.
        seed: of the split.
        progress: told (samples done, samples in all).

    Returns:
        The path of ``digits.yaml``.
    """
    tasks = []
    plans: list[ShardPlan] = []
    for first in range(0, len(CLASSES), 2):
        pair = CLASSES[first : first + 2]
        name = "-".join(pair)
        parts = _plan_parts(name, "digits", seed, {first, first + 1}, lambda scan, _: scan)
        plans += parts
        tasks.append(card_task(name, parts[:1], parts[1:], classes=list(pair)))
    card = {
        "name": "digits",
        "scenario": "class",
        "description": f"Handwritten digits, two new classes in every task. {SPLIT}",
    }
    return _finish(folder, card, tasks, plans, seed, progress)


def build_domains(folder: Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build `digits_domains`: all ten classes in each of five looks (32 x 32 RGB PNG).

    The looks are those of `digits_looks.LOOKS`. Every look holds every scan; a scan is in the train
    part of all looks or of none.

    Args:
        folder: where shards and card will lie.
        seed: of the split, of the noise and of the place of the stripes.
        progress: told (samples done, samples in all).

    Returns:
        The path of ``digits_domains.yaml``.
    """
    tasks = []
    plans: list[ShardPlan] = []
    for look, draw in LOOKS.items():
        parts = _plan_parts(look, look, seed, set(range(len(CLASSES))), draw)
        plans += parts
        tasks.append(card_task(look, parts[:1], parts[1:]))
    card = {
        "name": "digits_domains",
        "scenario": "domain",
        "description": (
            "The same handwritten digits in five looks: clean, inverted (blue ink on yellow "
            "paper), noisy (normal, deviation 70 of 255), rotated (40 degrees counter-clockwise), "
            f"striped (slanting bars over three eighths of the picture). {SPLIT}"
        ),
    }
    return _finish(folder, card, tasks, plans, seed, progress)


def split_indices(labels: Sequence[int], seed: int) -> dict[str, list[int]]:
    """Divide sample numbers into train and test, class by class.

    Args:
        labels: the class of every sample, in order.
        seed: of the draw.

    Returns:
        ``train`` and ``test``: sorted sample numbers; each class gives a quarter, rounded, to test.
    """
    split: dict[str, list[int]] = {"train": [], "test": []}
    for label in sorted(set(labels)):
        members = [number for number, own in enumerate(labels) if own == label]
        shuffled = np.random.default_rng([seed, label]).permutation(members).tolist()
        test_size = round(TEST_SHARE * len(members))
        split["test"] += shuffled[:test_size]
        split["train"] += shuffled[test_size:]
    return {part: sorted(numbers) for part, numbers in split.items()}


def _plan_parts(
    name: str,
    key_prefix: str,
    seed: int,
    wanted: set[int],
    draw: Callable[[Image.Image, np.random.Generator], Image.Image],
) -> list[ShardPlan]:
    """Plan the train and the test shard of one task."""
    labels: list[int] = load_digits().target.tolist()
    plans = []
    for part, numbers in split_indices(labels, seed).items():
        chosen = [number for number in numbers if labels[number] in wanted]
        samples = partial(_samples, chosen, key_prefix, seed, draw)
        plans.append(ShardPlan(f"{name}-{part}.tar", len(chosen), samples))
    return plans


def _samples(
    chosen: Sequence[int],
    key_prefix: str,
    seed: int,
    draw: Callable[[Image.Image, np.random.Generator], Image.Image],
) -> Iterator[Sample]:
    scans = load_digits()
    for number in chosen:
        # 0..16 to 0..255 by rounding; the 17 levels stay apart, so nothing is lost.
        grey = np.rint(scans.images[number] * 255 / 16).astype(np.uint8)
        label = int(scans.target[number])
        png = io.BytesIO()
        # One stream of numbers per scan, the same in every look, whatever else is built.
        draw(Image.fromarray(grey), np.random.default_rng([seed, number])).save(png, "PNG")
        yield {
            "__key__": f"{key_prefix}-{number:04d}",
            "png": png.getvalue(),
            "cls": str(label),
            "txt": f"the handwritten digit {CLASSES[label]}",
        }


def _finish(
    folder: Path,
    card: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    plans: Sequence[ShardPlan],
    seed: int,
    progress: Progress | None,
) -> Path:
    """Write the shards of the plans, then the card that names them."""
    name = card["name"]
    header = (
        f"Made by: mmcl data build {name} --seed {seed}",
        f"Licence: {LICENCE}",
        f"Samples: {sum(plan.count for plan in plans)} in {len(plans)} shards",
    )

    def card_texts(hashes: Mapping[str, str]) -> dict[str, str]:
        fields = {
            **card,
            "licence": LICENCE,
            "source": SOURCE,
            "classes": list(CLASSES),
            "templates": list(TEMPLATES),
            "kind": "classify",
            "stage": "cft",
            "tasks": list(tasks),
            "probes": [],
            "hashes": dict(hashes),
            "counts": card_counts(plans),
        }
        return {f"{name}.yaml": card_text(fields, header)}

    recipe = {"number": RECIPE, "seed": seed, "numpy": np.__version__, "pillow": PIL.__version__}
    return build_stream(
        folder, name, plans, [f"{name}.yaml"], card_texts, recipe=recipe, progress=progress
    )[0]
