"""Coloured, textured shapes on coloured pages."""

import math

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

from mmcl.data.builders.glyph_scenes import SIDE, Colour, add_noise

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 40),
    "green": (40, 160, 60),
    "blue": (35, 75, 215),
    "purple": (130, 45, 170),
    "pink": (250, 150, 190),
    "brown": (115, 70, 35),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
    "grey": (130, 130, 130),
}
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "heart",
    "diamond",
    "hexagon",
    "arrow",
    "moon",
)
TEXTURES = ("plain", "striped", "dotted", "checkered")
POLYGONS = {
    "square": ((-0.75, -0.75), (0.75, -0.75), (0.75, 0.75), (-0.75, 0.75)),
    "triangle": ((0, -0.9), (0.85, 0.65), (-0.85, 0.65)),
    "star": tuple(
        (
            (0.95, 0.4)[k % 2] * math.sin(k * math.pi / 5),
            -(0.95, 0.4)[k % 2] * math.cos(k * math.pi / 5),
        )
        for k in range(10)
    ),
    "cross": tuple(
        (x / 100, y / 100)
        for x, y in (
            *((-28, -90), (28, -90), (28, -28), (90, -28), (90, 28), (28, 28)),
            *((28, 90), (-28, 90), (-28, 28), (-90, 28), (-90, -28), (-28, -28)),
        )
    ),
    "diamond": ((0, -0.95), (0.62, 0), (0, 0.95), (-0.62, 0)),
    "hexagon": tuple(
        (0.9 * math.sin(k * math.pi / 3), 0.9 * math.cos(k * math.pi / 3)) for k in range(6)
    ),
    "arrow": tuple(
        (x / 100, y / 100)
        for x, y in ((-90, -25), (10, -25), (10, -70), (90, 0), (10, 70), (10, 25), (-90, 25))
    ),
    "heart": tuple(
        (
            0.055 * 16 * math.sin(t) ** 3,
            -0.055
            * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in (k * math.pi / 20 for k in range(40))
    ),
}
DRAWN = 2  # the shape is drawn this many times larger, and reduced to smooth its edges


def draw_shape(rng: Generator) -> tuple[Image.Image, dict[str, str]]:
    """Draw one shape, in one colour and texture, on a page of another colour.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB picture, and what is on it: ``shape``, ``colour``, ``texture``,
        ``page`` (a colour) and ``size`` ("small", "large" or "").
    """
    shape = SHAPES[rng.integers(len(SHAPES))]
    names = list(COLOURS)
    ink, page = (names[number] for number in rng.permutation(len(names))[:2])
    texture = TEXTURES[rng.integers(len(TEXTURES))] if rng.random() < 0.5 else "plain"
    radius = rng.uniform(0.24, 0.48) * SIDE
    colour = shift(COLOURS[ink], 18, rng)
    filled = fill(texture, colour, rng)
    outline = draw_outline(shape, radius, rng)
    picture = Image.new("RGB", (SIDE, SIDE), shift(COLOURS[page], 18, rng))
    picture.paste(filled, (0, 0), outline)
    if rng.random() < 0.1:
        picture = add_noise(picture, rng)
    size = "small" if radius < 0.3 * SIDE else "large" if radius > 0.4 * SIDE else ""
    facts = {"shape": shape, "colour": ink, "texture": texture, "page": page, "size": size}
    return picture, facts


def shift(colour: Colour, most: int, rng: Generator) -> Colour:
    """Move each channel of a colour by up to ``most`` grey values."""
    moved = np.clip(np.asarray(colour) + rng.integers(-most, most + 1, 3), 0, 255)
    red, green, blue = (int(value) for value in moved)
    return red, green, blue


def draw_outline(shape: str, radius: float, rng: Generator) -> Image.Image:
    """Draw a shape as a mask of mode L, somewhere on the page and turned a little."""
    side, middle = SIDE * DRAWN, radius * DRAWN
    x, y = rng.uniform(min(middle, side / 2 - 1), max(side - middle, side / 2), 2)
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    box = (x - middle, y - middle, x + middle, y + middle)
    if shape in POLYGONS:
        turn = rng.uniform(0, 2 * np.pi) if shape == "arrow" else rng.normal(0.0, 0.15)
        turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        corners = np.array(POLYGONS[shape]) @ turning.T * middle + (x, y)
        draw.polygon([(float(a), float(b)) for a, b in corners], fill=255)
        return mask.reduce(DRAWN)
    draw.ellipse(box, fill=255)
    if shape == "ring":
        inner = middle * rng.uniform(0.5, 0.7)
        draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    if shape == "moon":
        way = rng.uniform(0.4, 0.6) * middle * (1 if rng.random() < 0.5 else -1)
        draw.ellipse((x - middle + way, box[1] - 1, x + middle + way, box[3] - 1), fill=0)
    return mask.reduce(DRAWN)


def fill(texture: str, colour: Colour, rng: Generator) -> Image.Image:
    """Paint a whole page in a colour, with a pattern in a lighter or darker tone of it.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB picture.
    """
    down, across = np.mgrid[0:SIDE, 0:SIDE].astype(np.float64)
    angle = rng.uniform(0, np.pi)
    first = across * np.cos(angle) + down * np.sin(angle)
    second = down * np.cos(angle) - across * np.sin(angle)
    step = rng.uniform(6, 12)
    if texture == "striped":
        is_other = first % step < step / 2
    elif texture == "dotted":
        is_other = np.hypot(first % step - step / 2, second % step - step / 2) < step * 0.3
    elif texture == "checkered":
        is_other = (first % step < step / 2) ^ (second % step < step / 2)
    else:
        is_other = np.zeros((SIDE, SIDE), dtype=bool)
    goal = 0.0 if sum(colour) > 380 else 255.0
    own = np.asarray(colour, dtype=np.float64)
    other = own * 0.5 + goal * 0.5
    return Image.fromarray(np.where(is_other[..., None], other, own).astype(np.uint8))
