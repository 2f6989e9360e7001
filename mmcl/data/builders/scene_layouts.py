"""Where things stand: in corners, side by side, in a crowd; and which number a plate shows."""

from __future__ import annotations

from collections.abc import Sequence

from numpy.random import Generator

from mmcl.data.builders.scene_things import Box, Plate, Thing, compositions, is_kept_plate, pick
from mmcl.data.builders.scene_words import CORNERS, SHAPES, TEXTURES

CROWD_CELLS = 4  # a crowd stands in a square of so many cells a side
INKS = ("black", "blue", "red", "green", "purple")
GROUNDS = ("white", "yellow", "pink", "orange")
HARD_TO_READ = ({"red", "pink"}, {"red", "orange"})
FIGURE_SHARES = (0.25, 0.45, 0.3)  # of numbers of one, two and three figures


def draw_corners(
    part: str,
    count: int,
    rng: Generator,
    *,
    sides: tuple[int, ...] = (2, 4),
    names: tuple[str, ...] = SHAPES,
    places: tuple[str, ...] = CORNERS,
    textures: tuple[str, ...] = TEXTURES,
) -> tuple[Thing, ...]:
    """Put things into different places, no two of one colour or of one shape.

    Args:
        part: "train" or "test".
        count: things, at most as many as ``places``.
        rng: where all choices come from.
        sides: sides of the boxes to choose from, in tenths of the picture; 2 is small and 4 big.
        names: shapes or objects to choose from.
        places: to choose from.
        textures: to choose from; small things and objects are plain whatever is given.

    Returns:
        The things; their boxes lie on a grid of tenths.
    """
    things: list[Thing] = []
    for number in rng.permutation(len(places))[:count]:
        side = pick(sides, rng)
        colours = {thing.colour for thing in things}
        shapes = {thing.shape for thing in things}
        allowed = textures if side > 2 else TEXTURES[:1]
        free = [
            own
            for own in compositions(part, places[number], names)
            if own[0] not in colours and own[1] not in shapes and own[2] in allowed
        ]
        if not free:
            # The things so far leave no composition of this part for the place: begin again.
            return draw_corners(
                part, count, rng, sides=sides, names=names, places=places, textures=textures
            )
        colour, shape, texture, place = pick(free, rng)
        size = {2: "small", 4: "big"}.get(side, "")
        things.append(Thing(colour, shape, texture, place, size, choose_box(place, side, rng)))
    return tuple(things)


def choose_box(place: str, side: int, rng: Generator) -> Box:
    """Choose a box of ``side`` tenths that lies wholly in its corner, or about the middle."""
    if place == "middle":
        left, upper = ((10 - side) // 2 + int(rng.integers(2)) * (side % 2) for _ in range(2))
    else:
        left, upper = (
            5 * far + int(rng.integers(0, 6 - side))
            for far in ("right" in place, "bottom" in place)
        )
    return left / 10, upper / 10, (left + side) / 10, (upper + side) / 10


def draw_pair(part: str, sides: tuple[float, float], rng: Generator) -> tuple[Thing, ...]:
    """Stand two things of given sides (shares of the picture) on one ground, side by side."""
    things: list[Thing] = []
    for place, middle, side in zip(CORNERS[2:], (0.26, 0.74), sides, strict=True):
        free = [
            own
            for own in compositions(part, place, SHAPES)
            if own[2] == "plain"
            and all(own[0] != other.colour and own[1] != other.shape for other in things)
        ]
        colour, shape, texture, _ = pick(free, rng)
        left = middle - side / 2 + rng.uniform(-0.02, 0.02)
        box = (left, 0.8 - side, left + side, 0.8)
        things.append(Thing(colour, shape, texture, place, "", box))
    return tuple(things)


def draw_crowd(part: str, wanted: Sequence[tuple[str, str]], rng: Generator) -> tuple[Thing, ...]:
    """Put many small plain things into the cells of a square.

    Args:
        part: "train" or "test".
        wanted: for every thing a pattern (colour, shape); "" leaves the choice open, and a name
            after "not " is not chosen.
        rng: where all choices come from.

    Returns:
        A thing for every pattern; one that fits no free cell is left out.
    """
    things: list[Thing] = []
    cells = rng.permutation(CROWD_CELLS**2).tolist()
    for colour, shape in wanted:
        for cell in cells:
            row, column = divmod(cell, CROWD_CELLS)
            place = CORNERS[2 * (row >= CROWD_CELLS // 2) + (column >= CROWD_CELLS // 2)]
            free = [
                own
                for own in compositions(part, place, SHAPES)
                if own[2] == "plain" and fits(own[0], colour) and fits(own[1], shape)
            ]
            if free:
                cells.remove(cell)
                things.append(Thing(*pick(free, rng), "small", cell_box(row, column, rng)))
                break
    return tuple(things)


def fits(name: str, pattern: str) -> bool:
    """Match a name with "" (anything), "not x" or the name itself."""
    return name != pattern[4:] if pattern.startswith("not ") else pattern in ("", name)


def cell_box(row: int, column: int, rng: Generator) -> Box:
    """Choose a box in a cell of a crowd."""
    side = float(rng.uniform(0.175, 0.205))
    left, upper = (
        (number + 0.5) / CROWD_CELLS - side / 2 + float(rng.uniform(-0.015, 0.015))
        for number in (column, row)
    )
    return left, upper, left + side, upper + side


def draw_plate(part: str, rng: Generator) -> Plate:
    """Choose a number of one to three figures, dark on light or light on dark."""
    while True:
        figures = 1 + int(rng.choice(3, p=FIGURE_SHARES))
        first = 0 if figures == 1 else 10 ** (figures - 1)
        number = str(int(rng.integers(first, 10**figures)))
        colours = pick(INKS, rng), pick(GROUNDS, rng)
        ink, ground = colours if rng.random() < 0.5 else (colours[1], colours[0])
        plate = Plate(number, ink, ground)
        if {ink, ground} in HARD_TO_READ:
            continue
        if is_kept_plate(plate) == (part == "test"):
            return plate
