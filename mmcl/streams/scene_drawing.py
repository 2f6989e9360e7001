"""Drawing of a scene as a picture of 64 x 64: drawn four times larger, then reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageOps

from mmcl.streams.glyph_drawing import COLOURS as TONES
from mmcl.streams.glyph_drawing import POLYGONS, draw_strokes, shift
from mmcl.streams.scene_model import SHAPES, Plate, Scene, Thing

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


# A form is "tone kind numbers": the tone is main, dark, light or none (a hole); the kind is oval or
# box (left upper right lower) or poly (x y x y ...), in hundredths of the drawing.
_PETALS = "; ".join(
    f"main oval {50 + 27 * math.cos(k * 1.2566) - 20:.0f} {36 + 24 * math.sin(k * 1.2566) - 18:.0f}"
    f" {50 + 27 * math.cos(k * 1.2566) + 20:.0f} {36 + 24 * math.sin(k * 1.2566) + 18:.0f}"
    for k in range(5)
)
FORMS: Mapping[str, str] = {
    "ring": "main oval 0 0 100 100; none oval 28 28 72 72",
    "moon": "main oval 0 0 100 100; none oval 38 -6 130 92",
    "arrow": "main poly 0 36 55 36 55 8 100 50 55 92 55 64 0 64",
    "hexagon": "main poly 25 4 75 4 100 50 75 96 25 96 0 50",
    "house": "main box 14 44 86 100; dark poly 0 46 50 0 100 46; light box 42 64 60 100",
    "tree": "dark box 42 60 58 100; main oval 8 0 92 70",
    "car": (
        "main box 0 45 100 78; main poly 18 46 32 18 70 18 84 46"
        "; light poly 36 42 41 26 62 26 68 42; dark oval 10 62 36 90; dark oval 64 62 90 90"
    ),
    "boat": "main poly 0 64 100 64 82 100 18 100; dark box 46 0 52 64; main poly 57 4 57 56 96 56",
    "fish": "main oval 0 18 76 82; main poly 62 50 100 18 100 82; dark oval 14 36 28 50",
    "cat": (
        "main oval 8 24 92 100; main poly 10 56 12 0 48 32; main poly 90 56 88 0 52 32"
        "; light oval 26 48 42 64; light oval 58 48 74 64; dark poly 43 72 57 72 50 80"
    ),
    "bird": (
        "dark box 36 80 41 100; dark box 48 80 53 100; main oval 8 34 74 88; main oval 52 6 90 48"
        "; main poly 0 30 30 50 14 64; dark poly 86 20 100 29 86 36; light oval 68 16 77 26"
    ),
    "snail": (
        "dark poly 0 60 10 52 26 74 100 78 100 92 8 92; dark box 2 40 6 60; dark box 12 40 16 60"
        "; main oval 28 6 92 82; light oval 42 24 76 62; main oval 51 35 67 51"
    ),
    "flower": f"dark box 46 50 54 100; {_PETALS}; light oval 37 24 63 48",
    "face": (
        "main oval 0 0 100 100; dark oval 24 26 38 42; dark oval 62 26 76 42"
        "; dark oval 22 44 78 84; main oval 20 36 80 70"
    ),
    "key": (
        "main oval 0 26 48 74; none oval 14 40 34 60; main box 44 44 100 56; main box 72 56 80 76"
        "; main box 90 56 98 72"
    ),
    "cup": (
        "main oval 52 28 100 74; none oval 64 40 88 62; main poly 4 14 74 14 64 100 14 100"
        "; light oval 8 8 70 24"
    ),
}
_DARK, _LIGHT = (45, 40, 40, 255), (250, 250, 240, 255)


def draw_object(name: str, colour: Colour, size: tuple[int, int]) -> Image.Image:
    """Draw an object.

    Args:
        name: a key of `FORMS`.
        colour: of its main parts.
        size: of the picture, which it fills.

    Returns:
        An RGBA picture, empty around the object.
    """
    layer = Image.new("RGBA", size)
    draw = ImageDraw.Draw(layer)
    tones = {"main": (*colour, 255), "dark": _DARK, "light": _LIGHT, "none": (0, 0, 0, 0)}
    for form in FORMS[name].split(";"):
        tone, kind, *numbers = form.split()
        places = [float(number) / 100 * (size[axis % 2] - 1) for axis, number in enumerate(numbers)]
        if kind == "poly":
            draw.polygon(list(zip(places[::2], places[1::2], strict=True)), fill=tones[tone])
        elif kind == "oval":
            draw.ellipse(places, fill=tones[tone])
        else:
            draw.rectangle(places, fill=tones[tone])
    return layer


SIDE = 64
DRAWN = 4 * SIDE
_SHIFT = 12  # grey values by which a channel of a colour may move
_NOISE_DEVIATION = 38.0
_STEP = 32  # of stripes and dots, in drawn pixels
_LINE = 0.62  # fraction of a shape that is left empty in the look "outlines"


def draw_scene(scene: Scene, rng: Generator) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to draw; its look is one of clean, inverted, noisy, outlines.
        rng: of shades, pen strokes and noise.

    Returns:
        A ``SIDE`` x ``SIDE`` RGB picture.
    """
    picture = draw_page(scene.page, rng)
    for thing in scene.things:
        paint_thing(picture, thing, scene.look == "outlines", rng)
    if scene.plate is not None:
        paint_plate(picture, scene.plate, rng)
    small = picture.reduce(DRAWN // SIDE)
    if scene.look == "inverted":
        return ImageOps.invert(small)
    if scene.look == "noisy":
        values = np.asarray(small) + rng.normal(0.0, _NOISE_DEVIATION, (SIDE, SIDE, 3))
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    return small


def paint_thing(picture: Image.Image, thing: Thing, is_outline: bool, rng: Generator) -> None:
    """Paint a shape with its texture, or an object, so that it fills its box."""
    left, upper, right, lower = (round(DRAWN * value) for value in thing.box)
    colour = shift(TONES[thing.colour], _SHIFT, rng)
    size = (right - left, lower - upper)
    if thing.shape not in SHAPES:
        layer = draw_object(thing.shape, colour, size)
        picture.paste(layer, (left, upper), layer)
        return
    mask = draw_mask(thing.shape, size, is_outline)
    picture.paste(colour, (left, upper), mask)
    if thing.texture != "plain":
        across, down = (int(value) for value in rng.integers(0, _STEP, 2))
        pattern = draw_pattern(thing.texture).crop((across, down, across + size[0], down + size[1]))
        other = (255, 255, 255) if sum(colour) < 420 else (60, 60, 60)
        picture.paste(other, (left, upper), ImageChops.multiply(mask, pattern))


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
    """Draw slanting stripes or dots over more than a whole picture, as a mask of mode L."""
    down, across = np.mgrid[0 : DRAWN + _STEP, 0 : DRAWN + _STEP]
    if texture == "striped":
        is_other = (across + down) % _STEP < 0.45 * _STEP
    else:
        x, y = across % _STEP - _STEP / 2, down % _STEP - _STEP / 2
        is_other = np.hypot(x, y) < 0.3 * _STEP
    return Image.fromarray(np.where(is_other, 255, 0).astype(np.uint8))


def paint_plate(picture: Image.Image, plate: Plate, rng: Generator) -> None:
    """Paint a plate in the middle with a number written on it by hand."""
    draw = ImageDraw.Draw(picture)
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
        picture.paste(ink, (left + number * wide + (wide - own) // 2, upper), mask)
