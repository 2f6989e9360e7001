"""Scenes: vocabulary, things and plates, held-out compositions, and random layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TypeVar

from numpy.random import Generator

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
TEXTURES = ("plain", "striped", "dotted")
PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
CORNERS = PLACES[:4]
COUNTS = (
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen",
)  # fmt: skip
LETTERS = ("A", "B", "C", "D")
OBJECTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "signs": ("ring", "moon", "arrow", "hexagon"),
        "street": ("house", "tree", "car", "boat"),
        "animals": ("fish", "cat", "bird", "snail"),
        "home": ("flower", "face", "key", "cup"),
    }
)
"""Task of `scenes_words` -> its new names."""
OBJECT_NAMES = tuple(name for names in OBJECTS.values() for name in names)


def plural(shape: str) -> str:
    """Write the plural of a shape: "star" to "stars", "cross" to "crosses"."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def with_article(words: str) -> str:
    """Put "a" or "an" in front: "an orange star"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def count_things(count: int, one: str, many: str) -> str:
    """Write a count: "a red star", "three red stars", "no red stars"."""
    return with_article(one) if count == 1 else f"{COUNTS[count]} {many}"


def join(phrases: list[str]) -> str:
    """Join phrases as one speaks: "x", "x and y", "x, y and z"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


Box = tuple[float, float, float, float]
"""Left, upper, right, lower as fractions of the side, 0 to 1."""

Composition = tuple[str, str, str, str]
"""Color, shape, texture, place."""

SPLITS = ("train", "test")
HELD_OUT_EVERY = 5  # one composition in this many is for the test splits
Item = TypeVar("Item")


@dataclass(frozen=True)
class Thing:
    """A colored shape or object in a scene; ``size`` is "small", "big" or "" (in between)."""

    color: str
    shape: str
    texture: str
    place: str
    size: str
    box: Box

    @property
    def name(self) -> str:
        """Size, color, texture and shape, where there is one: "big red striped star"."""
        texture = "" if self.texture == "plain" else self.texture
        return " ".join(filter(None, (self.size, self.color, texture, self.shape)))

    @property
    def composition(self) -> Composition:
        """Combination that must be new in a test split."""
        return self.color, self.shape, self.texture, self.place


@dataclass(frozen=True)
class Plate:
    """A number written on a plate; ``ink`` and ``ground`` are names of colors."""

    number: str
    ink: str
    ground: str


@dataclass(frozen=True)
class Scene:
    """All that an image shows: things or a plate, on a page, in a look.

    Args:
        page: a key of `scene_drawing.PAGES`.
        things: the things on it.
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
    """Return whether a composition is held out for the test splits."""
    color, shape, texture, place = composition
    names = (*SHAPES, *OBJECT_NAMES)
    total = COLORS.index(color) + 2 * names.index(shape) + 3 * TEXTURES.index(texture)
    return (total + PLACES.index(place)) % HELD_OUT_EVERY == 0


def is_kept_plate(plate: Plate) -> bool:
    """Return whether a plate is held out for the test splits; a single figure with its colors."""
    total = sum((index + 1) * int(figure) for index, figure in enumerate(plate.number))
    if len(plate.number) == 1:
        total += len(plate.ink) + 2 * len(plate.ground)
    return total % HELD_OUT_EVERY == 0


def pick(items: Sequence[Item], rng: Generator) -> Item:
    """Choose one item, each as likely as the next."""
    return items[int(rng.integers(len(items)))]


@lru_cache(maxsize=64)
def compositions(split: str, place: str, names: tuple[str, ...]) -> tuple[Composition, ...]:
    """List the compositions allowed at a place in a split; objects are plain."""
    everything = (
        (color, name, texture, place)
        for color in COLORS
        for name in names
        for texture in (TEXTURES if name in SHAPES else TEXTURES[:1])
    )
    return tuple(found for found in everything if is_kept(found) == (split == "test"))


CROWD_CELLS = 4  # a crowd is in a square of this many cells a side
INKS = ("black", "blue", "red", "green", "purple")
GROUNDS = ("white", "yellow", "pink", "orange")
HARD_TO_READ = ({"red", "pink"}, {"red", "orange"})
FIGURE_WEIGHTS = (0.25, 0.45, 0.3)  # probability of numbers of one, two and three figures


def draw_corners(
    split: str,
    count: int,
    rng: Generator,
    *,
    sides: tuple[int, ...] = (2, 4),
    names: tuple[str, ...] = SHAPES,
    places: tuple[str, ...] = CORNERS,
    textures: tuple[str, ...] = TEXTURES,
) -> tuple[Thing, ...]:
    """Put things into different places, no two of one color or of one shape.

    Args:
        split: "train" or "test".
        count: things, at most as many as ``places``.
        rng: source of all choices.
        sides: sides of the boxes to choose from, in tenths of the image; 2 is small and 4 big.
        names: shapes or objects to choose from.
        places: to choose from.
        textures: to choose from; small things and objects are plain whatever is given.

    Returns:
        The things; their boxes are on a grid of tenths.
    """
    things: list[Thing] = []
    for number in rng.permutation(len(places))[:count]:
        side = pick(sides, rng)
        colors = {thing.color for thing in things}
        shapes = {thing.shape for thing in things}
        allowed = textures if side > 2 else TEXTURES[:1]
        free = [
            own
            for own in compositions(split, places[number], names)
            if own[0] not in colors and own[1] not in shapes and own[2] in allowed
        ]
        if not free:
            # The things so far leave no composition of this split for the place: start again.
            return draw_corners(
                split, count, rng, sides=sides, names=names, places=places, textures=textures
            )
        color, shape, texture, place = pick(free, rng)
        size = {2: "small", 4: "big"}.get(side, "")
        things.append(Thing(color, shape, texture, place, size, choose_box(place, side, rng)))
    return tuple(things)


def choose_box(place: str, side: int, rng: Generator) -> Box:
    """Choose a box of ``side`` tenths that is wholly in its corner, or around the middle."""
    if place == "middle":
        left, upper = ((10 - side) // 2 + int(rng.integers(2)) * (side % 2) for _ in range(2))
    else:
        left, upper = (
            5 * far + int(rng.integers(0, 6 - side))
            for far in ("right" in place, "bottom" in place)
        )
    return left / 10, upper / 10, (left + side) / 10, (upper + side) / 10


def draw_pair(split: str, sides: tuple[float, float], rng: Generator) -> tuple[Thing, ...]:
    """Put two things of given sides (fractions of the image) on one ground, side by side."""
    things: list[Thing] = []
    for place, middle, side in zip(CORNERS[2:], (0.26, 0.74), sides, strict=True):
        free = [
            own
            for own in compositions(split, place, SHAPES)
            if own[2] == "plain"
            and all(own[0] != other.color and own[1] != other.shape for other in things)
        ]
        color, shape, texture, _ = pick(free, rng)
        left = middle - side / 2 + rng.uniform(-0.02, 0.02)
        box = (left, 0.8 - side, left + side, 0.8)
        things.append(Thing(color, shape, texture, place, "", box))
    return tuple(things)


def draw_crowd(split: str, wanted: Sequence[tuple[str, str]], rng: Generator) -> tuple[Thing, ...]:
    """Put many small plain things into the cells of a square.

    Args:
        split: "train" or "test".
        wanted: for every thing a pattern (color, shape); "" leaves the choice open, and a name
            after "not " is not chosen.
        rng: source of all choices.

    Returns:
        A thing for every pattern; one that fits no free cell is left out.
    """
    things: list[Thing] = []
    cells = rng.permutation(CROWD_CELLS**2).tolist()
    for color, shape in wanted:
        for cell in cells:
            row, column = divmod(cell, CROWD_CELLS)
            place = CORNERS[2 * (row >= CROWD_CELLS // 2) + (column >= CROWD_CELLS // 2)]
            free = [
                own
                for own in compositions(split, place, SHAPES)
                if own[2] == "plain" and fits(own[0], color) and fits(own[1], shape)
            ]
            if free:
                cells.remove(cell)
                chosen, side = pick(free, rng), float(rng.uniform(0.175, 0.205))
                left, upper = (
                    (number + 0.5) / CROWD_CELLS - side / 2 + float(rng.uniform(-0.015, 0.015))
                    for number in (column, row)
                )
                box = (left, upper, left + side, upper + side)
                things.append(Thing(*chosen, "small", box))
                break
    return tuple(things)


def fits(name: str, pattern: str) -> bool:
    """Match a name with "" (anything), "not x" or the name itself."""
    return name != pattern[4:] if pattern.startswith("not ") else pattern in ("", name)


def draw_plate(split: str, rng: Generator) -> Plate:
    """Choose a number of one to three figures, dark on light or light on dark."""
    while True:
        figures = 1 + int(rng.choice(3, p=FIGURE_WEIGHTS))
        first = 0 if figures == 1 else 10 ** (figures - 1)
        number = str(int(rng.integers(first, 10**figures)))
        colors = pick(INKS, rng), pick(GROUNDS, rng)
        ink, ground = colors if rng.random() < 0.5 else (colors[1], colors[0])
        plate = Plate(number, ink, ground)
        if {ink, ground} in HARD_TO_READ:
            continue
        if is_kept_plate(plate) == (split == "test"):
            return plate
