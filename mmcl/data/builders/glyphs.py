"""The stream `glyphs`: made pictures with captions, on which the tiny CLIP is pre-trained.

Digits (written by hand or printed), printed letters, and coloured shapes, 64 x 64 RGB. Everything
is drawn here, from pen strokes and from the type faces that matplotlib ships; no scan of anybody's
handwriting is used, so `digits` stays a test that a model trained on this stream has never seen.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from numpy.random import Generator
from PIL import Image

from mmcl.data.builders.card import card_counts, card_task, card_text
from mmcl.data.builders.glyph_faces import FACES, HELD_OUT_FACES, LETTER_FACES, draw_print
from mmcl.data.builders.glyph_scenes import SIDE, colour, place_freely, scan_coarsely
from mmcl.data.builders.glyph_shapes import COLOURS, SHAPES, draw_shape
from mmcl.data.builders.glyph_strokes import draw_strokes
from mmcl.data.builders.shards import Progress, Sample, ShardPlan, build_stream

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SHARD_SIZE = 2000
LICENCE = "CC0-1.0 (made by this program)"
SOURCE = (
    "drawn by mmcl from pen strokes, geometry and the type faces shipped with matplotlib: "
    "DejaVu, STIX (SIL OFL 1.1) and BaKoMa Computer Modern"
)
RECIPE = 1  # counts up whenever the same seed would give other bytes

Made = tuple[Image.Image, str, str]
"""A picture, its caption, and the name of the class that a probe asks for."""


def draw_digit(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a digit: 65 % written by hand; 70 % coarse scans, the rest sharp and placed freely."""
    digit = int(rng.integers(10))
    is_handwritten = rng.random() < 0.65
    ink = draw_strokes(digit, rng) if is_handwritten else draw_print(str(digit), faces, rng)
    is_scan = rng.random() < 0.7
    picture = scan_or_place(ink, is_scan, rng)
    name = DIGITS[digit] if rng.random() < 0.7 else str(digit)
    captions = ["a photo of the digit {}.", "a photo of the number {}."]
    if is_handwritten:
        captions += ["the handwritten number {}.", "the handwritten digit {}"]
        captions += ["a scan of a handwritten {}."] * is_scan
    else:
        captions += ["the printed number {}."]
    return picture, captions[rng.integers(len(captions))].format(name), DIGITS[digit]


def draw_letter(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a printed letter, capital or small, as a coarse scan or sharp."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    form = letter.upper() if rng.random() < 0.6 else letter
    picture = scan_or_place(draw_print(form, faces, rng), bool(rng.random() < 0.3), rng)
    captions = ("a photo of the letter {}.", "the printed letter {}")
    return picture, captions[rng.integers(len(captions))].format(letter), letter


def scan_or_place(ink: Image.Image, is_scan: bool, rng: Generator) -> Image.Image:
    """Turn ink into a coloured picture, by way of a coarse scanner or not."""
    if not is_scan:
        return colour(place_freely(ink, rng), 0.3, rng)
    return colour(scan_coarsely(ink, 8 if rng.random() < 0.8 else 12, rng), 0.7, rng)


def draw_scene(ask: str, rng: Generator) -> Made:
    """Make a coloured shape; ``ask`` is the fact that names its class, "colour" or "shape"."""
    picture, facts = draw_shape(rng)
    words = [facts["colour"], facts["shape"]]
    if facts["texture"] != "plain":
        words.insert(1, facts["texture"])
    if facts["size"] and rng.random() < 0.3:
        words.insert(0, facts["size"])
    full = " ".join(words)
    captions = (
        f"a photo of a {full}.",
        f"a {full} on a {facts['page']} background",
        f"a photo of a {facts['colour']} {facts['shape']}.",
        f"a photo of a {facts['shape']}.",
        f"a photo of a {facts['colour']} shape.",
    )
    choice = rng.choice(len(captions), p=(0.25, 0.3, 0.25, 0.1, 0.1))
    return picture, captions[choice], facts[ask]


def draw_any(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a digit (40 %), a letter (25 %) or a shape (35 %)."""
    kind = rng.random()
    if kind < 0.4:
        return draw_digit(faces, rng)
    if kind < 0.65:
        return draw_letter((*faces, *LETTER_FACES), rng)
    return draw_scene("shape", rng)


PROBES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Generator], Made]]] = {
    "digits": (DIGITS, ("a photo of the digit {}.",), partial(draw_digit, HELD_OUT_FACES)),
    "letters": (LETTERS, ("a photo of the letter {}.",), partial(draw_letter, HELD_OUT_FACES)),
    "colours": (tuple(COLOURS), ("a photo of a {} shape.",), partial(draw_scene, "colour")),
    "shapes": (SHAPES, ("a photo of a {}.",), partial(draw_scene, "shape")),
}
"""Name -> classes, templates, and what draws a picture."""


def build(
    folder: Path,
    seed: int = 0,
    train: int = 48000,
    test: int = 600,
    progress: Progress | None = None,
) -> Path:
    """Build `glyphs`: one task of captions, and four probes that ask for class names.

    Printed characters of the test parts come from four faces that are in no training shard. A call
    that is killed goes on at the first shard that is not whole.

    Args:
        folder: where shards and card will lie.
        seed: of every choice; the same seed gives the same bytes with the same numpy, Pillow and
            matplotlib.
        train: pictures to train on.
        test: pictures in each of the five test parts.
        progress: told (pictures done, pictures in all).

    Returns:
        The path of ``glyphs.yaml``.

    Raises:
        ValueError: if ``train`` or ``test`` is below 1.
    """
    if min(train, test) < 1:
        raise ValueError(f"train is {train} and test is {test}: ask for at least 1 picture of each")
    learn = [
        plan_shard(
            f"train-{start // SHARD_SIZE:03d}",
            min(SHARD_SIZE, train - start),
            partial(draw_any, FACES),
            seed,
        )
        for start in range(0, train, SHARD_SIZE)
    ]
    held_out = plan_shard("test-captions", test, partial(draw_any, HELD_OUT_FACES), seed)
    probes = {
        name: plan_shard(f"test-{name}", test, draw, seed, classes)
        for name, (classes, _, draw) in PROBES.items()
    }
    plans = [*learn, held_out, *probes.values()]
    versions = {module.__name__: module.__version__ for module in (np, PIL, matplotlib)}
    recipe = {"number": RECIPE, "seed": seed, "train": train, "test": test, **versions}
    write_cards = partial(write_card, seed, learn, held_out, probes)
    return build_stream(
        folder, "glyphs", plans, ["glyphs.yaml"], write_cards, recipe=recipe, progress=progress
    )[0]


def write_card(
    seed: int,
    learn: Sequence[ShardPlan],
    held_out: ShardPlan,
    probes: Mapping[str, ShardPlan],
    hashes: Mapping[str, str],
) -> dict[str, str]:
    """Write the card of finished shards: file name -> text."""
    plans = [*learn, held_out, *probes.values()]
    card = {
        "name": "glyphs",
        "scenario": "domain",
        "description": (
            "Made pictures with captions: handwritten and printed digits, printed letters, "
            f"coloured shapes; {SIDE} x {SIDE} RGB PNG."
        ),
        "licence": LICENCE,
        "source": SOURCE,
        "kind": "caption",
        "stage": "cpt",
        "tasks": [card_task("glyphs", learn, [held_out])],
        "probes": [describe_probe(name, plan) for name, plan in probes.items()],
        "hashes": dict(hashes),
        "counts": card_counts(plans),
    }
    header = (
        f"Made by: mmcl data build glyphs --seed {seed}",
        f"Licence: {LICENCE}",
        f"Samples: {sum(plan.count for plan in plans)} in {len(plans)} shards",
    )
    return {"glyphs.yaml": card_text(card, header)}


def describe_probe(name: str, plan: ShardPlan) -> dict[str, object]:
    """Describe a probe as the card states it; its labels are positions in its own classes."""
    classes, templates, _ = PROBES[name]
    return {
        "name": name,
        "kind": "classify",
        "classes": list(classes),
        "templates": list(templates),
        "test": [plan.name],
        "test_size": plan.count,
    }


def plan_shard(
    name: str,
    count: int,
    draw: Callable[[Generator], Made],
    seed: int,
    classes: tuple[str, ...] = (),
) -> ShardPlan:
    """Plan a shard of pictures with captions, and with labels where ``classes`` are given."""
    return ShardPlan(f"{name}.tar", count, partial(make_samples, name, count, draw, seed, classes))


def make_samples(
    name: str,
    count: int,
    draw: Callable[[Generator], Made],
    seed: int,
    classes: tuple[str, ...],
) -> Iterator[Sample]:
    """Make the samples of a shard; its random numbers follow from ``seed`` and its name alone."""
    rng = np.random.default_rng([seed, *name.encode()])
    for number in range(count):
        picture, caption, own = draw(rng)
        png = io.BytesIO()
        picture.save(png, "PNG", compress_level=4)
        sample = {"__key__": f"{name}-{number:05d}", "png": png.getvalue(), "txt": caption}
        yield {**sample, "cls": str(classes.index(own))} if classes else sample
