"""From a scene to a picture of 64 x 64: drawn four times larger, then reduced."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageOps

from mmcl.data.builders.glyph_shapes import COLOURS as TONES
from mmcl.data.builders.glyph_shapes import POLYGONS, shift
from mmcl.data.builders.glyph_strokes import draw_strokes
from mmcl.data.builders.scene_objects import draw_object
from mmcl.data.builders.scene_pages import draw_page
from mmcl.data.builders.scene_things import Plate, Scene, Thing
from mmcl.data.builders.scene_words import SHAPES

SIDE = 64
DRAWN = 4 * SIDE
_SHIFT = 12  # grey values by which a channel of a colour may move
_NOISE_DEVIATION = 38.0
_STEP = 32  # of stripes and dots, in drawn pixels
_LINE = 0.62  # share of a shape that is left empty in the look "outlines"


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
