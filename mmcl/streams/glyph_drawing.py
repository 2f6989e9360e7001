"""Drawing of glyphs: shapes on coloured pages, handwritten digits, coarse scans and noise."""

from __future__ import annotations

import math

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64
ENLARGE = (
    Image.Resampling.BILINEAR,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
    Image.Resampling.BICUBIC,
    Image.Resampling.NEAREST,
)
Colour = tuple[int, int, int]


def scan_coarsely(ink: Image.Image, cells: int, rng: Generator) -> Image.Image:
    """Read a glyph with a coarse scanner, as the early collections of handwriting were made.

    The glyph is cut out, fitted to a bitmap of four dots a cell, each cell counts its dots, and the
    counts are enlarged again.

    Args:
        ink: picture of mode L with some ink on 0.
        cells: cells a side, 8 or 12.
        rng: source of all choices.

    Returns:
        A ``SIDE`` x ``SIDE`` picture of mode L.
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


def choose_colours(rng: Generator, grey: float) -> tuple[Colour, Colour]:
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


def colour(ink: Image.Image, grey: float, rng: Generator) -> Image.Image:
    """Colour a picture of mode L, with noise on one picture in eight."""
    bright, dark = choose_colours(rng, grey)
    picture = Image.composite(
        Image.new("RGB", ink.size, bright), Image.new("RGB", ink.size, dark), ink
    )
    return add_noise(picture, rng) if rng.random() < 0.125 else picture


def add_noise(picture: Image.Image, rng: Generator) -> Image.Image:
    """Add normal noise of 4 to 14 grey values."""
    values = np.asarray(picture, dtype=np.float32)
    noisy = values + rng.normal(0.0, rng.uniform(4, 14), values.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


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


Points = NDArray[np.float64]

CANVAS = 128  # pixels a side while drawing; halved at the end, which smooths the edges

# The ways in which people write a digit. A way is a list of curves separated by ";", a curve a list
# of points "x,y" in hundredths of the digit's box (y downwards). Curves that meet share a point.
SKELETONS: dict[int, tuple[str, ...]] = {
    0: (
        "50,0 10,28 10,72 50,100 90,72 90,28 50,0",
        "62,2 20,20 8,65 35,100 80,85 92,35 62,2 45,6",
        "35,8 8,40 15,85 50,100 88,75 90,30 60,0 30,10 22,22",
        "50,0 2,30 2,70 50,100 98,70 98,30 50,0",
    ),
    1: (
        "50,0 50,100",
        "66,0 36,100",
        "18,30 55,0; 55,0 55,100",
        "25,22 58,0; 58,0 52,100",
        "20,25 52,0; 52,0 52,100; 15,100 88,100",
        "50,0 50,100; 22,100 78,100",
        "5,42 60,0; 60,0 56,100",
        "42,0 50,35 48,70 54,100",
    ),
    2: (
        "10,22 35,0 75,5 82,32 52,64 8,100; 8,100 92,100",
        "8,20 45,0 85,20 70,52 12,94 10,98 45,92 95,98",
        "12,25 50,2 80,22 60,60 30,88 8,90 22,74 48,88 72,100 94,90",
        "18,10 60,0 82,25 62,60 20,100; 20,100 88,92",
        "2,12 55,0 90,20 75,48 30,70 5,98; 5,98 98,100",
    ),
    3: (
        "10,12 48,0 85,20 45,46; 45,46 90,72 52,100 6,88",
        "12,3 85,3; 85,3 42,42; 42,42 90,66 60,98 8,92",
        "15,8 70,2 80,28 38,48; 38,48 85,55 85,90 40,100 8,90",
        "8,18 50,0 78,22 55,44 30,48 75,52 92,76 55,100 10,92",
        "5,4 60,0 88,22 60,45 35,47; 35,47 92,58 80,94 5,98",
    ),
    4: (
        "68,100 68,0; 68,0 5,66; 5,66 96,66",
        "30,0 8,55; 8,55 92,55; 70,20 62,100",
        "22,0 10,48 30,60 80,50; 82,5 70,100",
        "55,0 5,60; 5,60 95,60; 62,36 56,100",
        "12,4 12,50; 12,50 85,50; 82,0 82,100",
        "50,0 30,30 4,68 50,64 96,60; 66,40 62,100",
    ),
    5: (
        "86,2 22,2; 22,2 16,44; 16,44 55,36 88,62 62,97 8,92",
        "92,0 30,4; 30,4 12,46; 12,46 70,42 80,80 40,100 5,88",
        "88,4 20,4; 20,4 20,42; 20,42 78,48 84,86 30,100 12,92",
        "20,4 14,44; 14,44 60,34 90,66 55,98 10,94; 20,4 92,0",
        "80,0 35,8 24,44; 24,44 62,50 66,84 12,100",
    ),
    6: (
        "72,0 32,26 10,66 32,98 72,94 86,70 58,52 14,70",
        "45,0 18,40 12,82 48,100 84,80 68,56 22,64",
        "86,4 40,14 8,58 28,98 76,96 90,66 52,50 18,72",
        "30,0 14,60 40,100 80,88 76,58 44,54 16,76",
    ),
    7: (
        "6,4 90,4; 90,4 42,100",
        "6,4 90,4; 90,4 40,100; 26,52 80,52",
        "4,18 10,2 50,8 92,2; 92,2 60,45 46,100",
        "8,6 86,2; 86,2 60,50 52,100; 20,50 92,44",
        "4,22 8,4; 8,4 88,4; 88,4 50,55 44,100; 20,56 78,50",
        "12,0 80,0; 80,0 72,100; 40,48 100,46",
    ),
    8: (
        "50,48 14,24 50,0 86,24 50,48 8,76 50,100 92,76 50,48",
        "80,10 45,0 18,22 50,46 88,74 52,100 12,78 50,48 84,12",
        "62,46 25,30 40,2 76,10 62,46 20,70 30,98 72,92 62,46",
        "50,46 28,22 50,0 72,22 50,46; 50,46 12,74 50,100 88,74 50,46",
        "72,4 30,4 20,26 55,48 80,78 46,100 22,80 52,48 78,24 66,2",
    ),
    9: (
        "84,24 50,0 14,24 40,50 84,24; 84,24 80,62 62,100",
        "82,18 45,0 12,28 45,52 82,22; 82,10 82,100",
        "80,28 55,2 18,16 22,46 60,50 82,18; 82,18 84,80 50,100 12,90",
        "76,14 40,2 14,30 46,48 78,16; 78,16 56,100",
        "88,22 50,0 10,22 48,46 88,22; 88,22 88,70 70,98 20,98",
    ),
}


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


def read_skeleton(text: str) -> list[Points]:
    """Read "x,y x,y; x,y ..." into curves, each (N, 2) in 0..1."""
    return [
        np.array([[float(value) / 100 for value in point.split(",")] for point in curve.split()])
        for curve in text.split(";")
    ]


def draw_strokes(digit: int, rng: Generator) -> Image.Image:
    """Write a digit by hand, once.

    The skeleton is swayed by a smooth random field (so curves that meet still meet), then slanted,
    turned and stretched, and drawn with a round pen that presses more or less along the way.

    Args:
        digit: 0 to 9.
        rng: source of all choices.

    Returns:
        A 64 x 64 picture of mode L: ink 255 on 0.
    """
    ways = SKELETONS[digit]
    curves = read_skeleton(ways[rng.integers(len(ways))])
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
