"""The pages on which scenes stand: one kind for each skill, so that a picture tells its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

_SIDE = 256
_VARIANTS = 8

Colour = tuple[int, int, int]


def draw_page(name: str, rng: Generator) -> Image.Image:
    """Draw an empty page of 256 x 256, in one of eight shades.

    Args:
        name: a key of `PAGES`.
        rng: chooses the shade.
    """
    return _page(name, int(rng.integers(_VARIANTS))).copy()


@lru_cache(maxsize=128)
def _page(name: str, variant: int) -> Image.Image:
    rng = np.random.default_rng([variant, *name.encode()])
    return PAGES[name](rng)


def _near(colour: Colour, rng: Generator) -> Colour:
    red, green, blue = (int(v) for v in np.clip(colour + rng.integers(-9, 10, 3), 0, 255))
    return red, green, blue


def _plain(colour: Colour) -> Callable[[Generator], Image.Image]:
    return lambda rng: Image.new("RGB", (_SIDE, _SIDE), _near(colour, rng))


def _squared(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((244, 246, 248), rng))
    draw, ink = ImageDraw.Draw(page), _near((170, 195, 225), rng)
    for place in range(0, _SIDE + 1, 32):
        draw.line((place, 0, place, _SIDE), fill=ink, width=5)
        draw.line((0, place, _SIDE, place), fill=ink, width=5)
    return page


def _wood(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(page)
    for number, upper in enumerate(range(0, _SIDE, 32)):
        shade = (214, 186, 140) if number % 2 else (190, 158, 112)
        draw.rectangle((0, upper, _SIDE, upper + 32), fill=_near(shade, rng))
    return page


def _night(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((22, 24, 52), rng))
    draw = ImageDraw.Draw(page)
    for x, y in rng.integers(0, _SIDE, (40, 2)).tolist():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(170, 170, 190))
    return page


def _window(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((205, 205, 205), rng))
    draw, frame = ImageDraw.Draw(page), _near((80, 80, 80), rng)
    draw.rectangle((0, 0, _SIDE - 1, _SIDE - 1), outline=frame, width=8)
    draw.line((_SIDE // 2, 0, _SIDE // 2, _SIDE), fill=frame, width=8)
    draw.line((0, _SIDE // 2, _SIDE, _SIDE // 2), fill=frame, width=8)
    return page


def _shelf(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((205, 228, 242), rng))
    low = round(0.8 * _SIDE)
    ImageDraw.Draw(page).rectangle((0, low, _SIDE, _SIDE), fill=_near((120, 110, 100), rng))
    return page


def _checkered(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((205, 222, 196), rng))
    draw, other = ImageDraw.Draw(page), _near((176, 200, 168), rng)
    for row in range(8):
        for column in range(row % 2, 8, 2):
            draw.rectangle((32 * column, 32 * row, 32 * column + 31, 32 * row + 31), fill=other)
    return page


def _dots(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (_SIDE, _SIDE), _near((228, 222, 214), rng))
    draw, other = ImageDraw.Draw(page), _near((120, 120, 120), rng)
    for row in range(12):
        for column in range(12):
            x, y = 22 * column + 11 * (row % 2), 22 * row
            draw.ellipse((x, y, x + 9, y + 9), fill=other)
    return page


PAGES: Mapping[str, Callable[[Generator], Image.Image]] = {
    "white": _plain((242, 242, 242)),
    "grey": _plain((150, 150, 150)),
    "black": _plain((24, 24, 24)),
    "asphalt": _plain((70, 72, 76)),
    "squared": _squared,
    "wood": _wood,
    "night": _night,
    "window": _window,
    "shelf": _shelf,
    "checkered": _checkered,
    "spots": _dots,
}
"""Name of a page -> what draws it."""
