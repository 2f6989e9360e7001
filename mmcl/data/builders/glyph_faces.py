"""Printed letters and digits, from type faces of matplotlib: DejaVu, STIX, Computer Modern."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

# Text faces only: the others hold mathematical signs, and `cmmi10` prints digits in the old style.
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmr10",
    "cmti10",
    "cmtt10",
)
LETTER_FACES = ("cmmi10",)
# Never in a training shard, so that the probes ask for letter forms and not for memory of a face.
HELD_OUT_FACES = ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralBol", "cmss10")


@lru_cache(maxsize=4096)
def print_character(face: str, character: str, side: int = 64) -> Image.Image:
    """Print one character in the middle of a square.

    Args:
        face: name of a face in matplotlib's font folder, without ``.ttf``.
        character: one character.
        side: pixels; the character is about two thirds as high.

    Returns:
        A picture of mode L: ink 255 on 0. It is shared between callers: do not draw on it.

    Raises:
        FileNotFoundError: if matplotlib has no such face.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(
            f"matplotlib {matplotlib.__version__} ships no face {face!r}: "
            f"install another version of matplotlib (3.8 to 3.11 have it)"
        )
    font = ImageFont.truetype(str(path), size=round(side * 0.85))
    left, upper, right, lower = font.getbbox(character)
    ink = Image.new("L", (side, side))
    place = ((side - left - right) / 2, (side - upper - lower) / 2)
    ImageDraw.Draw(ink).text(place, character, fill=255, font=font)
    return ink


def draw_print(character: str, faces: tuple[str, ...], rng: Generator) -> Image.Image:
    """Print a character in one of the faces, turned, slanted, stretched and bent a little.

    Returns:
        A 64 x 64 picture of mode L: ink 255 on 0.
    """
    ink = print_character(faces[rng.integers(len(faces))], character)
    turn, slant = rng.normal(0.0, 0.12), rng.normal(0.0, 0.15)
    wide, high = rng.uniform(0.75, 1.3), rng.uniform(0.95, 1.15)
    turning = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = turning @ np.array([[1 / wide, slant], [0.0, 1 / high]])
    return bend(ink, matrix, strength=rng.uniform(0.0, 2.2), rng=rng)


def bend(ink: Image.Image, matrix: np.ndarray, strength: float, rng: Generator) -> Image.Image:
    """Warp a square picture: an affine map about its middle, then a push of every grid point.

    Args:
        ink: picture of mode L.
        matrix: (2, 2) from places in the result to places in ``ink``.
        strength: deviation of the push, in pixels.
        rng: where the pushes come from.
    """
    side, cells = ink.width, 4
    ticks = np.linspace(0, side, cells + 1)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1) - side / 2
    source = grid @ matrix.T + side / 2 + rng.normal(0.0, strength, grid.shape)
    mesh = []
    for row in range(cells):
        for column in range(cells):
            box = tuple(int(ticks[i]) for i in (column, row, column + 1, row + 1))
            corners = (
                source[row, column],
                source[row + 1, column],
                source[row + 1, column + 1],
                source[row, column + 1],
            )
            mesh.append((box, tuple(float(value) for corner in corners for value in corner)))
    return ink.transform(ink.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)
