"""What stands in a scene and where, and which compositions are kept for the test parts.

A composition is a colour, a shape, a texture and a place. Every fifth is kept for the tests of the
stream: no picture to learn from shows one, and the things in a test picture are all of that kind,
while each colour is learned with each shape, texture and place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from numpy.random import Generator

from mmcl.data.builders.scene_words import (
    COLOURS,
    OBJECT_NAMES,
    PLACES,
    SHAPES,
    TEXTURES,
)

Box = tuple[float, float, float, float]
"""Left, upper, right, lower as shares of the side, 0 to 1."""

Composition = tuple[str, str, str, str]
"""Colour, shape, texture, place."""

PARTS = ("train", "test")
KEPT_SHARE = 5  # one composition in so many is for the test parts
Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """A coloured shape or object in a scene; ``size`` is "small", "big" or "" (in between)."""

    colour: str
    shape: str
    texture: str
    place: str
    size: str
    box: Box

    @property
    def composition(self) -> Composition:
        """What must be new in a test part."""
        return self.colour, self.shape, self.texture, self.place


@dataclass(frozen=True)
class Plate:
    """A number written on a plate; ``ink`` and ``ground`` are names of colours."""

    number: str
    ink: str
    ground: str


@dataclass(frozen=True)
class Scene:
    """All that a picture shows: things or a plate, on a page, in a look.

    Args:
        page: a key of `scene_pages.PAGES`.
        things: what stands on it.
        plate: a number instead of things.
        look: clean, inverted, noisy or outlines.
        is_crowd: whether the things are many small ones, which a caption counts.
    """

    page: str
    things: tuple[Thing, ...] = ()
    plate: Plate | None = None
    look: str = "clean"
    is_crowd: bool = False


def is_kept(composition: Composition) -> bool:
    """Say whether a composition is for the test parts alone."""
    colour, shape, texture, place = composition
    names = (*SHAPES, *OBJECT_NAMES)
    total = COLOURS.index(colour) + 2 * names.index(shape) + 3 * TEXTURES.index(texture)
    return (total + PLACES.index(place)) % KEPT_SHARE == 0


def is_kept_plate(plate: Plate) -> bool:
    """Say whether a plate is for the test parts alone; one figure counts with its colours."""
    total = sum((place + 1) * int(figure) for place, figure in enumerate(plate.number))
    if len(plate.number) == 1:
        total += len(plate.ink) + 2 * len(plate.ground)
    return total % KEPT_SHARE == 0


def pick(items: Sequence[Item], rng: Generator) -> Item:
    """Choose one item, each as likely as the next."""
    return items[int(rng.integers(len(items)))]


@lru_cache(maxsize=64)
def compositions(part: str, place: str, names: tuple[str, ...]) -> tuple[Composition, ...]:
    """List what may stand at a place in a part; objects are plain."""
    everything = (
        (colour, name, texture, place)
        for colour in COLOURS
        for name in names
        for texture in (TEXTURES if name in SHAPES else TEXTURES[:1])
    )
    return tuple(found for found in everything if is_kept(found) == (part == "test"))
