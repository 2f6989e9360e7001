"""The streams `digits` and `digits_domains`: real handwriting, by class or by look.

Data: scikit-learn's `load_digits`, the 1,797 scans (8 x 8 pixels, 17 grey levels) of the test part
of UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from mmcl.data.convert.task_split import class_groups, class_order
from mmcl.data.shards.stream_writer import Progress, Sample, ShardPlan, card_task
from mmcl.streams.stream_files import Card, png_bytes, write_stream

PIXELS = 32
_INK, _PAPER = (50, 30, 130), (250, 215, 120)
_NOISE_DEVIATION = 70.0
_TURN_DEGREES = 40
_STRIPE_PERIOD, _STRIPE_WIDTH, _STRIPE_GREY = 8, 3, 150

Look = Callable[[Image.Image, np.random.Generator], Image.Image]
"""Function (grey scan of any size, its own generator) -> 32 x 32 RGB image."""


def clean(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Enlarge the scan, white on black, and change nothing else."""
    return _enlarge(scan).convert("RGB")


def inverted(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Write in dark blue ink on yellow paper."""
    return ImageOps.colorize(_enlarge(scan), black=_PAPER, white=_INK)


def noisy(scan: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Add normal noise of deviation 70 (of 255), each color by itself."""
    clear = np.asarray(clean(scan, draw), dtype=np.float64)
    noise = draw.normal(0.0, _NOISE_DEVIATION, clear.shape)
    return Image.fromarray(np.clip(clear + noise, 0, 255).astype(np.uint8))


def rotated(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Turn by 40 degrees, counter-clockwise, and make it smaller so that no corner is cut off."""
    turned = _enlarge(scan).rotate(_TURN_DEGREES, Image.Resampling.BICUBIC, expand=True)
    return turned.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).convert("RGB")


def striped(scan: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Hide three eighths of the image under slanting grey bars that begin anywhere."""
    pixels = np.array(clean(scan, draw))
    start = int(draw.integers(_STRIPE_PERIOD))
    across = np.arange(PIXELS)[:, None] + np.arange(PIXELS)[None, :]
    pixels[(across + start) % _STRIPE_PERIOD < _STRIPE_WIDTH] = _STRIPE_GREY
    return Image.fromarray(pixels)


def _enlarge(scan: Image.Image) -> Image.Image:
    return scan.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


LOOKS: Mapping[str, Look] = {
    "clean": clean,
    "inverted": inverted,
    "noisy": noisy,
    "rotated": rotated,
    "striped": striped,
}
"""In the order of the tasks."""


CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "a photo of the digit {}.",
    "the handwritten number {}.",
    "a scan of a handwritten {}.",
)
LICENSE = "CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/)"
SOURCE = (
    "E. Alpaydin, C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine "
    "Learning Repository, doi:10.24432/C50P49; its test part, as scikit-learn's load_digits"
)
SPLIT = (
    "Split: in every class a seeded quarter of the scans, rounded, is the test part. "
    "The data do not say who wrote a scan, so a writer may be in both parts."
)
TEST_FRACTION = 0.25
_SPLIT = (("classes_per_task", 2), ("first_task_classes", None), ("class_order_seed", None))
"""Options of `build` and their defaults."""
RECIPE = 1  # counts up whenever the same seed would give other bytes


def build(
    folder: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    classes_per_task: int = 2,
    first_task_classes: int | None = None,
    class_order_seed: int | None = None,
) -> Path:
    """Build `digits`: five tasks of two classes, the scans as they are (8 x 8 grey PNG).

    Args:
        folder: output folder of shards and card.
        seed: of the split.
        progress: called with (samples done, samples in total).
        classes_per_task: new classes of each task; the last may have fewer.
        first_task_classes: classes of the first task; None = as many as in the others.
        class_order_seed: seed of the order of the classes, see `class_order`; None = ascending.

    Returns:
        The path of ``digits.yaml``.

    Raises:
        ValueError: as `class_groups` says.
    """
    order = list(range(len(CLASSES)))
    if class_order_seed is not None:
        order = class_order(len(CLASSES), class_order_seed)
    given = (classes_per_task, first_task_classes, class_order_seed)
    settings = {k: v for (k, default), v in zip(_SPLIT, given, strict=True) if v != default}
    about = ", ".join(f"{key} {value}" for key, value in settings.items())
    tasks = []
    plans: list[ShardPlan] = []
    for group in class_groups(len(CLASSES), classes_per_task, first_task_classes):
        labels = [order[position] for position in group]
        names = [CLASSES[label] for label in labels]
        name = "-".join(names)
        shards = plan_scans(name, "digits", seed, set(labels), lambda scan, _: scan)
        plans += shards
        tasks.append(card_task(name, shards[:1], shards[1:], classes=names))
    card = {
        "name": "digits",
        "scenario": "class",
        "description": f"Handwritten digits, {about or 'two new classes in every task'}. {SPLIT}",
        "tasks": tasks,
    }
    return _write(folder, card, plans, {"seed": seed, **settings}, progress)


def build_domains(folder: Path, seed: int = 0, progress: Progress | None = None) -> Path:
    """Build `digits_domains`: all ten classes in each of five looks (32 x 32 RGB PNG).

    The looks are those of `LOOKS`. Every look has every scan; a scan is in the train
    split of all looks or of none.

    Args:
        folder: output folder of shards and card.
        seed: seed of the split, the noise and the position of the stripes.
        progress: called with (samples done, samples in total).

    Returns:
        The path of ``digits_domains.yaml``.
    """
    tasks = []
    plans: list[ShardPlan] = []
    for look, draw in LOOKS.items():
        shards = plan_scans(look, look, seed, set(range(len(CLASSES))), draw)
        plans += shards
        tasks.append(card_task(look, shards[:1], shards[1:]))
    card = {
        "name": "digits_domains",
        "scenario": "domain",
        "shift": "content",
        "description": (
            "The same handwritten digits in five looks: clean, inverted (blue ink on yellow "
            "paper), noisy (normal, deviation 70 of 255), rotated (40 degrees counter-clockwise), "
            f"striped (slanting bars over three eighths of the picture). {SPLIT}"
        ),
        "tasks": tasks,
    }
    return _write(folder, card, plans, {"seed": seed}, progress)


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
        test_size = round(TEST_FRACTION * len(members))
        split["test"] += shuffled[:test_size]
        split["train"] += shuffled[test_size:]
    return {name: sorted(numbers) for name, numbers in split.items()}


def plan_scans(
    name: str, key_prefix: str, seed: int, wanted: set[int], draw: Look
) -> list[ShardPlan]:
    """Plan the train and the test shard of one task: the scans of some classes in a look."""
    labels: list[int] = load_digits().target.tolist()
    plans = []
    for split, numbers in split_indices(labels, seed).items():
        chosen = [number for number in numbers if labels[number] in wanted]
        samples = partial(_samples, chosen, key_prefix, seed, draw)
        plans.append(ShardPlan(f"{name}-{split}.tar", len(chosen), samples))
    return plans


def _samples(chosen: Sequence[int], key_prefix: str, seed: int, draw: Look) -> Iterator[Sample]:
    scans = load_digits()
    for number in chosen:
        # 0..16 to 0..255 by rounding; the 17 levels stay distinct, so nothing is lost.
        grey = np.rint(scans.images[number] * 255 / 16).astype(np.uint8)
        label = int(scans.target[number])
        # One stream of numbers per scan, the same in every look, whatever else is built.
        image = draw(Image.fromarray(grey), np.random.default_rng([seed, number]))
        yield {
            "__key__": f"{key_prefix}-{number:04d}",
            "png": png_bytes(image),
            "cls": str(label),
            "txt": f"the handwritten digit {CLASSES[label]}",
        }


def _write(
    folder: Path,
    card: Card,
    plans: Sequence[ShardPlan],
    settings: Mapping[str, int | None],
    progress: Progress | None,
) -> Path:
    """Write the shards of the plans, then the card that names them; ``settings`` has the seed."""
    card = {
        **card,
        "license": LICENSE,
        "source": SOURCE,
        "classes": list(CLASSES),
        "templates": list(TEMPLATES),
        "task_type": "classification",
        "stage": "cft",
    }
    recipe = {"number": RECIPE, **settings, "numpy": np.__version__, "pillow": PIL.__version__}
    words = " ".join(f"--{key} {value}" for key, value in settings.items())
    made_by = f"mmcl data build {card['name']} {words}"
    cards = [(card, plans)]
    return write_stream(card["name"], folder, cards, recipe, progress, made_by=made_by)[0]
