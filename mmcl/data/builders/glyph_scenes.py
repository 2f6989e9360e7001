"""From ink to a picture: a coarse scan, or a coloured page; blur and noise."""

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageFilter

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
        rng: where all choices come from.

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
        rng: where all choices come from.
        grey: share of light grey ink on near-black paper; of the rest half is dark on light.
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
