"""Drawing of glyphs: shapes on colored pages, handwritten digits, coarse scans and noise."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from mmcl.streams.stream_files import read_table

SIDE = 64
ENLARGE = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.BICUBIC,
    Image.Resampling.NEAREST,
)
CANVAS = 128  # pixels a side while a digit is drawn; halved at the end, which smooths the edges
Color = tuple[int, int, int]
Points = NDArray[np.float64]


def scan_coarsely(ink: Image.Image, cells: int, rng: Generator) -> Image.Image:
    """Read a glyph with a coarse scanner, as the early collections of handwriting were made.

    The glyph is cut out, fitted to a bitmap of four dots a cell, each cell counts its dots, and the
    counts are enlarged again.

    Args:
        ink: image of mode L with some ink on 0.
        cells: cells a side, 8 or 12.
        rng: source of all choices.

    Returns:
        A ``SIDE`` x ``SIDE`` image of mode L.
    """
    side = 4 * cells
    glyph = ink.crop(ink.getbbox())
    high = side if rng.random() < 0.7 else int(side * rng.uniform(0.8, 1.0))
    natural = glyph.width / glyph.height * high * rng.uniform(0.85, 1.2)
    wide = int(np.clip(natural, 3, side))
    fitted = glyph.resize((wide, high), Image.Resampling.BILINEAR)
    across = int(np.clip((side - wide) / 2 + rng.normal(0, 1.5), 0, side - wide))
    down = int(rng.integers(0, side - high + 1))
    dots = Image.new("L", (side, side))
    dots.paste(fitted.point(lambda value: 255 if value > 110 else 0), (across, down))
    way = ENLARGE[rng.integers(len(ENLARGE))]
    return dots.reduce(4).resize((SIDE, SIDE), way)


def place_freely(ink: Image.Image, rng: Generator) -> Image.Image:
    """Put a glyph somewhere on the page, at 45 to 95 % of its side, sharp or blurred."""
    glyph = ink.crop(ink.getbbox())
    longest = rng.uniform(0.45, 0.95) * SIDE
    scale = longest / max(glyph.size)
    wide, high = (max(2, int(side * scale)) for side in glyph.size)
    page = Image.new("L", (SIDE, SIDE))
    corner = (int(rng.integers(0, SIDE - wide + 1)), int(rng.integers(0, SIDE - high + 1)))
    page.paste(glyph.resize((wide, high), Image.Resampling.BILINEAR), corner)
    if rng.random() < 0.4:
        page = page.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0)))
    return page


def choose_colors(rng: Generator, grey: float) -> tuple[Color, Color]:
    """Choose ink and paper that differ plainly in brightness.

    Args:
        rng: source of all choices.
        grey: fraction of light grey ink on near-black paper; half of the rest is dark on light.
    """
    kind = rng.random()
    if kind < grey:
        bright, dark = int(rng.integers(200, 256)), int(rng.integers(0, 40) * (rng.random() < 0.4))
        return (bright,) * 3, (dark,) * 3
    if kind < grey + (1 - grey) / 2:
        bright, dark = int(rng.integers(215, 256)), int(rng.integers(0, 70))
        return (dark,) * 3, (bright,) * 3
    while True:
        ink, paper = rng.integers(0, 256, (2, 3))
        if abs(int(ink.sum()) - int(paper.sum())) > 250:
            return tuple(ink.tolist()), tuple(paper.tolist())


def color(ink: Image.Image, grey: float, rng: Generator) -> Image.Image:
    """Color an image of mode L, with noise on one image in eight."""
    bright, dark = choose_colors(rng, grey)
    image = Image.composite(
        Image.new("RGB", ink.size, bright), Image.new("RGB", ink.size, dark), ink
    )
    return add_noise(image, rng) if rng.random() < 0.125 else image


def add_noise(image: Image.Image, rng: Generator) -> Image.Image:
    """Add normal noise of 4 to 14 grey values."""
    values = np.asarray(image, dtype=np.float32)
    noisy = values + rng.normal(0.0, rng.uniform(4, 14), values.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


COLORS: dict[str, Color] = {
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
    "circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "hexagon", "arrow",
    "moon",
)  # fmt: skip
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
    """Draw one shape, in one color and texture, on a page of another color.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB image, and what is on it: ``shape``, ``color``, ``texture``,
        ``page`` (a color) and ``size`` ("small", "large" or "").
    """
    shape = SHAPES[rng.integers(len(SHAPES))]
    names = list(COLORS)
    ink, page = (names[number] for number in rng.permutation(len(names))[:2])
    texture = TEXTURES[rng.integers(len(TEXTURES))] if rng.random() < 0.5 else "plain"
    radius = rng.uniform(0.24, 0.48) * SIDE
    color = shift(COLORS[ink], 18, rng)
    filled = fill(texture, color, rng)
    outline = draw_outline(shape, radius, rng)
    image = Image.new("RGB", (SIDE, SIDE), shift(COLORS[page], 18, rng))
    image.paste(filled, (0, 0), outline)
    if rng.random() < 0.1:
        image = add_noise(image, rng)
    size = "small" if radius < 0.3 * SIDE else "large" if radius > 0.4 * SIDE else ""
    facts = {"shape": shape, "color": ink, "texture": texture, "page": page, "size": size}
    return image, facts


def shift(color: Color, most: int, rng: Generator) -> Color:
    """Move each channel of a color by up to ``most`` grey values."""
    moved = np.clip(np.asarray(color) + rng.integers(-most, most + 1, 3), 0, 255)
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


def fill(texture: str, color: Color, rng: Generator) -> Image.Image:
    """Paint a whole page in a color, with a pattern in a lighter or darker tone of it.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB image.
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
    goal = 0.0 if sum(color) > 380 else 255.0
    own = np.asarray(color, dtype=np.float64)
    other = own * 0.5 + goal * 0.5
    return Image.fromarray(np.where(is_other[..., None], other, own).astype(np.uint8))


def smooth_curve(points: Points, steps: int = 8) -> Points:
    """Run a Catmull-Rom curve through the points.

    Args:
        points: (N, 2) places that the curve goes through, two or more.
        steps: places per stretch between two of the points.

    Returns:
        (steps * (N - 1) + 1, 2) places along the curve, both ends included.
    """
    before = np.vstack([2 * points[0] - points[1], points[:-2]])
    after = np.vstack([points[2:], 2 * points[-1] - points[-2]])
    start, end = points[:-1], points[1:]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (
        2 * start[:, None]
        + (end - before)[:, None] * t
        + (2 * before - 5 * start + 4 * end - after)[:, None] * t**2
        + (3 * start - before - 3 * end + after)[:, None] * t**3
    )
    return np.vstack([curve.reshape(-1, 2), points[-1:]])


@cache
def read_skeletons() -> dict[int, list[list[Points]]]:
    """Read the ways in which people write each digit: lists of curves, each (N, 2) in 0..1."""
    ways: dict[int, list[list[Points]]] = {digit: [] for digit in range(10)}
    for digit, way in read_table("digit_strokes.tsv"):
        curves = [[point.split(",") for point in curve.split()] for curve in way.split(";")]
        ways[int(digit)].append([np.array(curve, dtype=np.float64) / 100 for curve in curves])
    return ways


def draw_strokes(digit: int, rng: Generator) -> Image.Image:
    """Write a digit by hand, once.

    The skeleton is swayed by a smooth random field (so curves that meet still meet), then slanted,
    turned and stretched, and drawn with a round pen that presses more or less along the way.

    Args:
        digit: 0 to 9.
        rng: source of all choices.

    Returns:
        A 64 x 64 image of mode L: ink 255 on 0.
    """
    ways = read_skeletons()[digit]
    curves = ways[rng.integers(len(ways))]
    wave = rng.uniform(1.5, 5.0, (2, 2)), rng.uniform(0, 2 * np.pi, (2, 2))
    strength = rng.uniform(0.0, 0.055, (2, 2))
    slant, turn = rng.normal(0.0, 0.18), rng.normal(0.0, 0.10)
    width = rng.uniform(0.42, 0.95)
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = turning @ np.array([[width, -slant], [0.0, 1.0]])
    pen = CANVAS * rng.uniform(0.031, 0.084)
    scale = CANVAS * 0.56

    ink = Image.new("L", (CANVAS, CANVAS))
    draw = ImageDraw.Draw(ink)
    for curve in curves:
        shaken = curve + rng.normal(0.0, 0.015, curve.shape)
        moved = shaken + (strength * np.sin(wave[0] * shaken[:, None, :] + wave[1])).sum(-1)
        path = smooth_curve(moved - 0.5) @ matrix.T * scale + CANVAS / 2
        radius = pen * (
            1 + rng.uniform(0, 0.25) * np.sin(np.linspace(0, rng.uniform(2, 6), len(path)))
        )
        draw.line([tuple(place) for place in path], fill=255, width=round(2 * pen))
        for (x, y), r in zip(path, radius, strict=True):
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return ink.reduce(2)
