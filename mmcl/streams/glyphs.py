"""The stream `glyphs`: generated images with captions, on which the tiny CLIP is pre-trained.

Digits (handwritten or printed), printed letters, and colored shapes, 64 x 64 RGB. Everything is
drawn here, from pen strokes and from the type faces that matplotlib ships; no scan of real
handwriting is used, so a model trained on this stream has never seen the data of `digits`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path

import matplotlib
import numpy as np
import PIL
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

from mmcl.data.shards.stream_writer import Progress, Sample, ShardPlan, card_task
from mmcl.streams.glyph_drawing import (
    COLORS,
    SHAPES,
    SIDE,
    color,
    draw_shape,
    draw_strokes,
    place_freely,
    scan_coarsely,
)
from mmcl.streams.stream_files import Card, png_bytes, write_stream

# Text faces only: the others hold mathematical signs, and `cmmi10` prints digits in the old style.
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-BoldOblique", "DejaVuSansMono",
    "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique", "DejaVuSansMono-Oblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-BoldItalic", "STIXGeneral", "STIXGeneralBolIta",
    "STIXGeneralItalic", "cmb10", "cmr10", "cmti10", "cmtt10",
)  # fmt: skip
LETTER_FACES = ("cmmi10",)
# Never in a training shard, so that eval-only tasks ask for letter forms, not for a known face.
HELD_OUT_FACES = ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")


@lru_cache(maxsize=4096)
def print_character(face: str, character: str, side: int = 64) -> Image.Image:
    """Print one character in the middle of a square.

    Args:
        face: name of a face in matplotlib's font folder, without ``.ttf``.
        character: one character.
        side: pixels; the character is about two thirds as high.

    Returns:
        An image of mode L: ink 255 on 0. It is shared between callers: do not draw on it.

    Raises:
        FileNotFoundError: if matplotlib has no such face.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(
            f"matplotlib {matplotlib.__version__} ships no face {face!r}: "
            "install matplotlib 3.11 or newer"
        )
    font = ImageFont.truetype(str(path), size=round(side * 0.85))
    left, upper, right, lower = font.getbbox(character)
    ink = Image.new("L", (side, side))
    place = ((side - left - right) / 2, (side - upper - lower) / 2)
    ImageDraw.Draw(ink).text(place, character, fill=255, font=font)
    return ink


def draw_print(character: str, faces: tuple[str, ...], rng: Generator) -> Image.Image:
    """Print a character in one of the faces, turned, slanted, stretched and bent a little.

    Returns:
        A 64 x 64 image of mode L: ink 255 on 0.
    """
    ink = print_character(faces[rng.integers(len(faces))], character)
    turn, slant = rng.normal(0.0, 0.12), rng.normal(0.0, 0.15)
    wide, high = rng.uniform(0.75, 1.3), rng.uniform(0.95, 1.15)
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = turning @ np.array([[1 / wide, slant], [0.0, 1 / high]])
    return bend(ink, matrix, strength=rng.uniform(0.0, 2.2), rng=rng)


def bend(ink: Image.Image, matrix: np.ndarray, strength: float, rng: Generator) -> Image.Image:
    """Warp a square image: an affine map about its middle, then a push of every grid point.

    Args:
        ink: image of mode L.
        matrix: (2, 2) from places in the result to places in ``ink``.
        strength: deviation of the push, in pixels.
        rng: source of the pushes.
    """
    side, cells = ink.width, 4
    ticks = np.linspace(0, side, cells + 1)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1) - side / 2
    source = grid @ matrix.T + side / 2 + rng.normal(0.0, strength, grid.shape)
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = tuple(int(ticks[i]) for i in (column, row, column + 1, row + 1))
            corners = (
                source[row, column],
                source[row + 1, column],
                source[row + 1, column + 1],
                source[row, column + 1],
            )
            mesh.append((box, tuple(float(value) for corner in corners for value in corner)))
    return ink.transform(ink.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
SHARD_SIZE = 2000
_CARD = {
    "name": "glyphs",
    "scenario": "domain",
    "shift": "content",
    "description": "Made pictures with captions: handwritten and printed digits, printed letters, "
    f"coloured shapes; {SIDE} x {SIDE} RGB PNG.",
    "license": "CC0-1.0 (made by this program)",
    "source": "drawn by mmcl from pen strokes, geometry and the type faces shipped with "
    "matplotlib: DejaVu, STIX (SIL OFL 1.1) and BaKoMa Computer Modern",
    "task_type": "captioning",
    "stage": "cpt",
}
RECIPE = 1  # counts up whenever the same seed would give other bytes

Made = tuple[Image.Image, str, str]
"""An image, its caption, and the name of the class that an eval-only task asks for."""
Draw = Callable[[Generator], Made]


def draw_digit(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a digit: 65 % handwritten; 70 % coarse scans, the rest sharp and placed freely."""
    digit = int(rng.integers(10))
    is_handwritten = rng.random() < 0.65
    ink = draw_strokes(digit, rng) if is_handwritten else draw_print(str(digit), faces, rng)
    is_scan = rng.random() < 0.7
    image = scan_or_place(ink, is_scan, rng)
    name = DIGITS[digit] if rng.random() < 0.7 else str(digit)
    captions = ["a photo of the digit {}.", "a photo of the number {}."]
    if is_handwritten:
        captions += ["the handwritten number {}.", "the handwritten digit {}"]
        captions += ["a scan of a handwritten {}."] * is_scan
    else:
        captions += ["the printed number {}."]
    return image, captions[rng.integers(len(captions))].format(name), DIGITS[digit]


def draw_letter(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a printed letter, capital or small, as a coarse scan or sharp."""
    letter = LETTERS[rng.integers(len(LETTERS))]
    form = letter.upper() if rng.random() < 0.6 else letter
    image = scan_or_place(draw_print(form, faces, rng), bool(rng.random() < 0.3), rng)
    captions = ("a photo of the letter {}.", "the printed letter {}")
    return image, captions[rng.integers(len(captions))].format(letter), letter


def scan_or_place(ink: Image.Image, is_scan: bool, rng: Generator) -> Image.Image:
    """Turn ink into a colored image, by way of a coarse scanner or not."""
    if not is_scan:
        return color(place_freely(ink, rng), 0.3, rng)
    return color(scan_coarsely(ink, 8 if rng.random() < 0.8 else 12, rng), 0.7, rng)


def draw_scene(class_fact: str, rng: Generator) -> Made:
    """Make a colored shape; ``class_fact`` names its class: "color" or "shape"."""
    image, facts = draw_shape(rng)
    words = [facts["color"], facts["shape"]]
    if facts["texture"] != "plain":
        words.insert(1, facts["texture"])
    if facts["size"] and rng.random() < 0.3:
        words.insert(0, facts["size"])
    full = " ".join(words)
    captions = (
        f"a photo of a {full}.",
        f"a {full} on a {facts['page']} background",
        f"a photo of a {facts['color']} {facts['shape']}.",
        f"a photo of a {facts['shape']}.",
        f"a photo of a {facts['color']} shape.",
    )
    choice = rng.choice(len(captions), p=(0.25, 0.3, 0.25, 0.1, 0.1))
    return image, captions[choice], facts[class_fact]


def draw_any(faces: tuple[str, ...], rng: Generator) -> Made:
    """Make a digit (40 %), a letter (25 %) or a shape (35 %)."""
    kind = rng.random()
    if kind < 0.4:
        return draw_digit(faces, rng)
    if kind < 0.65:
        return draw_letter((*faces, *LETTER_FACES), rng)
    return draw_scene("shape", rng)


EVAL_ONLY: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], Draw]] = {
    "digits": (DIGITS, ("a photo of the digit {}.",), partial(draw_digit, HELD_OUT_FACES)),
    "letters": (LETTERS, ("a photo of the letter {}.",), partial(draw_letter, HELD_OUT_FACES)),
    "colours": (tuple(COLORS), ("a photo of a {} shape.",), partial(draw_scene, "color")),
    "shapes": (SHAPES, ("a photo of a {}.",), partial(draw_scene, "shape")),
}
"""Name -> classes, templates, and what draws an image."""


def build(
    folder: Path,
    seed: int = 0,
    train: int = 48000,
    test: int = 600,
    progress: Progress | None = None,
) -> Path:
    """Build `glyphs`: one task of captions, and four eval-only tasks that ask for class names.

    Printed characters of the test splits come from four faces that are in no training shard. A call
    that was killed resumes at the first shard that is not whole.

    Args:
        folder: output folder of shards and card.
        seed: seed of every choice; the same seed gives the same bytes with the same numpy, Pillow
            and matplotlib.
        train: images to train on.
        test: images in each of the five test splits.
        progress: called with (images done, images in total).

    Returns:
        The path of ``glyphs.yaml``.

    Raises:
        ValueError: if ``train`` or ``test`` is below 1.
    """
    if min(train, test) < 1:
        raise ValueError(f"train is {train} and test is {test}: ask for at least 1 picture of each")
    draw_learned = partial(draw_any, FACES)
    learn = [
        plan_shard(f"train-{n:03d}", min(SHARD_SIZE, train - n * SHARD_SIZE), draw_learned, seed)
        for n in range(math.ceil(train / SHARD_SIZE))
    ]
    held_out = plan_shard("test-captions", test, partial(draw_any, HELD_OUT_FACES), seed)
    eval_only, entries = _plan_eval_only(test, seed)
    tasks = [card_task("glyphs", learn, [held_out])]
    plans = [*learn, held_out, *eval_only]
    versions = {module.__name__: module.__version__ for module in (np, PIL, matplotlib)}
    recipe = {"number": RECIPE, "seed": seed, "train": train, "test": test, **versions}
    card = {**_CARD, "tasks": tasks, "eval_only": entries}
    return write_stream("glyphs", folder, [(card, plans)], recipe, progress)[0]


def _plan_eval_only(test: int, seed: int) -> tuple[list[ShardPlan], list[Card]]:
    """Plan the eval-only tasks: shards and card entries; labels are indices of own classes."""
    plans, entries = [], []
    for name, (classes, templates, draw) in EVAL_ONLY.items():
        plan = plan_shard(f"test-{name}", test, draw, seed, classes)
        entry = {"name": name, "task_type": "classification", "classes": list(classes)}
        own = {"templates": list(templates), "test": [plan.name], "test_size": plan.count}
        plans.append(plan)
        entries.append({**entry, **own})
    return plans, entries


def plan_shard(
    name: str, count: int, draw: Draw, seed: int, classes: tuple[str, ...] = ()
) -> ShardPlan:
    """Plan a shard of images with captions, and with labels where ``classes`` are given."""
    return ShardPlan(f"{name}.tar", count, partial(make_samples, name, count, draw, seed, classes))


def make_samples(
    name: str, count: int, draw: Draw, seed: int, classes: tuple[str, ...]
) -> Iterator[Sample]:
    """Make the samples of a shard; its random numbers follow from ``seed`` and its name alone."""
    rng = np.random.default_rng([seed, *name.encode()])
    for number in range(count):
        image, caption, own = draw(rng)
        png = png_bytes(image, compress_level=4)
        sample = {"__key__": f"{name}-{number:05d}", "png": png, "txt": caption}
        yield {**sample, "cls": str(classes.index(own))} if classes else sample
