"""Drawing of a scene as an image of 64 x 64: drawn four times larger, then reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageOps

from mmcl.streams.glyph_drawing import COLORS as TONES
from mmcl.streams.glyph_drawing import POLYGONS, draw_strokes, shift
from mmcl.streams.scene_model import SHAPES, Plate, Scene, Thing
from mmcl.streams.stream_files import read_table

SIDE = 64
DRAWN = 4 * SIDE
_VARIANTS = 8

Color = tuple[int, int, int]


def draw_page(name: str, rng: Generator) -> Image.Image:
    """Draw an empty page of 256 x 256 (a key of `PAGES`), in one of eight shades."""
    return _page(name, int(rng.integers(_VARIANTS))).copy()


@lru_cache(maxsize=128)
def _page(name: str, variant: int) -> Image.Image:
    return PAGES[name](np.random.default_rng([variant, *name.encode()]))


def _plain(color: Color, rng: Generator) -> Image.Image:
    return Image.new("RGB", (DRAWN, DRAWN), _near(color, rng))


def _near(color: Color, rng: Generator) -> Color:
    return shift(color, 9, rng)


def _squared(rng: Generator) -> Image.Image:
    page = _plain((244, 246, 248), rng)
    draw, ink = ImageDraw.Draw(page), _near((170, 195, 225), rng)
    for place in range(0, DRAWN + 1, 32):
        draw.line((place, 0, place, DRAWN), fill=ink, width=5)
        draw.line((0, place, DRAWN, place), fill=ink, width=5)
    return page


def _wood(rng: Generator) -> Image.Image:
    page = Image.new("RGB", (DRAWN, DRAWN))
    draw = ImageDraw.Draw(page)
    for number, upper in enumerate(range(0, DRAWN, 32)):
        shade = (214, 186, 140) if number % 2 else (190, 158, 112)
        draw.rectangle((0, upper, DRAWN, upper + 32), fill=_near(shade, rng))
    return page


def _night(rng: Generator) -> Image.Image:
    page = _plain((22, 24, 52), rng)
    draw = ImageDraw.Draw(page)
    for x, y in rng.integers(0, DRAWN, (40, 2)).tolist():
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(170, 170, 190))
    return page


def _window(rng: Generator) -> Image.Image:
    page = _plain((205, 205, 205), rng)
    draw, frame = ImageDraw.Draw(page), _near((80, 80, 80), rng)
    draw.rectangle((0, 0, DRAWN - 1, DRAWN - 1), outline=frame, width=8)
    draw.line((DRAWN // 2, 0, DRAWN // 2, DRAWN), fill=frame, width=8)
    draw.line((0, DRAWN // 2, DRAWN, DRAWN // 2), fill=frame, width=8)
    return page


def _shelf(rng: Generator) -> Image.Image:
    page = _plain((205, 228, 242), rng)
    low = round(0.8 * DRAWN)
    ImageDraw.Draw(page).rectangle((0, low, DRAWN, DRAWN), fill=_near((120, 110, 100), rng))
    return page


def _checkered(rng: Generator) -> Image.Image:
    page = _plain((205, 222, 196), rng)
    draw, other = ImageDraw.Draw(page), _near((176, 200, 168), rng)
    for row in range(8):
        for column in range(row % 2, 8, 2):
            draw.rectangle((32 * column, 32 * row, 32 * column + 31, 32 * row + 31), fill=other)
    return page


def _dots(rng: Generator) -> Image.Image:
    page = _plain((228, 222, 214), rng)
    draw, other = ImageDraw.Draw(page), _near((120, 120, 120), rng)
    for row in range(12):
        for column in range(12):
            x, y = 22 * column + 11 * (row % 2), 22 * row
            draw.ellipse((x, y, x + 9, y + 9), fill=other)
    return page


PAGES: Mapping[str, Callable[[Generator], Image.Image]] = {
    "white": partial(_plain, (242, 242, 242)),
    "grey": partial(_plain, (150, 150, 150)),
    "black": partial(_plain, (24, 24, 24)),
    "asphalt": partial(_plain, (70, 72, 76)),
    "squared": _squared,
    "wood": _wood,
    "night": _night,
    "window": _window,
    "shelf": _shelf,
    "checkered": _checkered,
    "spots": _dots,
}
"""Name of a page -> what draws it."""


_DARK, _LIGHT = (45, 40, 40, 255), (250, 250, 240, 255)


@cache
def read_forms() -> Mapping[str, str]:
    """Read the forms of every object; the table says what they mean."""
    return {name: forms for name, forms in read_table("object_forms.tsv")}


def draw_object(name: str, color: Color, size: tuple[int, int]) -> Image.Image:
    """Draw an object.

    Args:
        name: a key of ``read_forms()``.
        color: of its main parts.
        size: of the image, which it fills.

    Returns:
        An RGBA image, empty around the object.
    """
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    tones = {"main": (*color, 255), "dark": _DARK, "light": _LIGHT, "none": (0, 0, 0, 0)}
    for form in read_forms()[name].split(";"):
        tone, kind, *numbers = form.split()
        places = [float(number) / 100 * (size[axis % 2] - 1) for axis, number in enumerate(numbers)]
        if kind == "poly":
            draw.polygon(list(zip(places[::2], places[1::2], strict=True)), fill=tones[tone])
        elif kind == "oval":
            draw.ellipse(places, fill=tones[tone])
        else:
            draw.rectangle(places, fill=tones[tone])
    return layer


_SHIFT = 12  # grey values by which a channel of a color may move
_NOISE_DEVIATION = 38.0
_STEP = 32  # of stripes and dots, in drawn pixels
_LINE = 0.62  # fraction of a shape that is left empty in the look "outlines"


def draw_scene(scene: Scene, rng: Generator) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to draw; its look is one of clean, inverted, noisy, outlines.
        rng: of shades, pen strokes and noise.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB image.
    """
    image = draw_page(scene.page, rng)
    for thing in scene.things:
        paint_thing(image, thing, scene.look == "outlines", rng)
    if scene.plate is not None:
        paint_plate(image, scene.plate, rng)
    small = image.reduce(DRAWN // SIDE)
    if scene.look == "inverted":
        return ImageOps.invert(small)
    if scene.look == "noisy":
        values = np.asarray(small) + rng.normal(0.0, _NOISE_DEVIATION, (SIDE, SIDE, 3))
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return small


def paint_thing(image: Image.Image, thing: Thing, is_outline: bool, rng: Generator) -> None:
    """Paint a shape with its texture, or an object, so that it fills its box."""
    left, upper, right, lower = (round(DRAWN * value) for value in thing.box)
    color = shift(TONES[thing.color], _SHIFT, rng)
    size = (right - left, lower - upper)
    if thing.shape not in SHAPES:
        layer = draw_object(thing.shape, color, size)
        image.paste(layer, (left, upper), layer)
        return
    mask = draw_mask(thing.shape, size, is_outline)
    image.paste(color, (left, upper), mask)
    if thing.texture != "plain":
        across, down = (int(value) for value in rng.integers(0, _STEP, 2))
        pattern = draw_pattern(thing.texture).crop((across, down, across + size[0], down + size[1]))
        other = (255, 255, 255) if sum(color) < 420 else (60, 60, 60)
        image.paste(other, (left, upper), ImageChops.multiply(mask, pattern))


@lru_cache(maxsize=512)
def draw_mask(shape: str, size: tuple[int, int], is_outline: bool) -> Image.Image:
    """Draw a shape as a mask of mode L that it touches on all four sides."""
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for scale, ink in ((1.0, 255), (_LINE, 0)) if is_outline else ((1.0, 255),):
        if shape == "circle":
            rest = [(1 - scale) / 2 * side for side in size]
            draw.ellipse((*rest, size[0] - 1 - rest[0], size[1] - 1 - rest[1]), fill=ink)
            continue
        corners = np.array(POLYGONS[shape])
        corners = (corners - corners.min(0)) / (corners.max(0) - corners.min(0))
        # About the mean, not the middle, so that the line of a triangle is as wide everywhere.
        middle = corners.mean(0)
        corners = (middle + (corners - middle) * scale) * (np.array(size) - 1)
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=ink)
    return mask


@lru_cache(maxsize=4)
def draw_pattern(texture: str) -> Image.Image:
    """Draw slanting stripes or dots over more than a whole image, as a mask of mode L."""
    down, across = np.mgrid[0 : DRAWN + _STEP, 0 : DRAWN + _STEP]
    if texture == "striped":
        is_other = (across + down) % _STEP < 0.45 * _STEP
    else:
        x, y = across % _STEP - _STEP / 2, down % _STEP - _STEP / 2
        is_other = np.hypot(x, y) < 0.3 * _STEP
    return Image.fromarray(np.where(is_other, 255, 0).astype(np.uint8))


def paint_plate(image: Image.Image, plate: Plate, rng: Generator) -> None:
    """Paint a plate in the middle with a number written on it by hand."""
    draw = ImageDraw.Draw(image)
    ground, ink = (shift(TONES[name], _SHIFT, rng) for name in (plate.ground, plate.ink))
    high = int(DRAWN * rng.uniform(0.46, 0.56))
    wide = min(int(high * 0.62), math.floor(0.9 * DRAWN / len(plate.number)))
    left = (DRAWN - wide * len(plate.number)) // 2 + int(rng.integers(-8, 9)) * (
        len(plate.number) < 3
    )
    upper = (DRAWN - high) // 2 + int(rng.integers(-14, 15))
    box = (10, upper - 22, DRAWN - 10, upper + high + 22)
    draw.rounded_rectangle(box, 20, fill=ground, outline=ink, width=6)
    gap = wide // 10
    for number, figure in enumerate(plate.number):
        stroke = draw_strokes(int(figure), rng)
        stroke = stroke.crop(stroke.getbbox())
        # A one stays as narrow as it is written.
        own = min(wide - gap, max(8, round(stroke.width * high / stroke.height)))
        mask = stroke.resize((own, high), Image.Resampling.BILINEAR)
        image.paste(ink, (left + number * wide + (wide - own) // 2, upper), mask)
