"""From the one picture that a font has of an emoji to many that differ."""

from __future__ import annotations

import numpy as np
from PIL import Image

PIXELS = 64
SHARE = (0.55, 0.92)
"""The glyph's larger side, as a share of the picture's side."""
DEGREES = 25.0
"""Angles lie in [-25, 25]."""


def augment(glyph: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Put a glyph on a background, turned, sized and placed as the generator says.

    Args:
        glyph: square RGBA picture of any size.
        draw: generator of this picture alone; half of the backgrounds are one colour, half run
            from one colour to another.

    Returns:
        A 64 x 64 RGB picture with the whole glyph inside, but for corners that turn out of it.
    """
    side = round(PIXELS * draw.uniform(*SHARE))
    angle = float(draw.uniform(-DEGREES, DEGREES))
    room = PIXELS - side
    place = int(draw.integers(room + 1)), int(draw.integers(room + 1))
    canvas = background(draw)
    small = glyph.resize((side, side), Image.Resampling.LANCZOS)
    turned = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    grown = (turned.width - side) // 2
    canvas.alpha_composite(*_clipped(turned, place[0] - grown, place[1] - grown))
    return canvas.convert("RGB")


def _clipped(picture: Image.Image, left: int, top: int) -> tuple[Image.Image, tuple[int, int]]:
    """Cut what would stand left of or above the canvas, which `alpha_composite` refuses."""
    cut_left, cut_top = max(-left, 0), max(-top, 0)
    kept = picture.crop((cut_left, cut_top, picture.width, picture.height))
    return kept, (max(left, 0), max(top, 0))


def background(draw: np.random.Generator) -> Image.Image:
    """Draw a 64 x 64 RGBA background: one colour, or a straight run between two at any angle."""
    first, second = draw.integers(0, 256, (2, 3))
    turn = draw.uniform(0.0, 2.0 * np.pi)
    if draw.random() < 0.5:
        second = first
    steps = np.linspace(-1.0, 1.0, PIXELS)
    along = np.cos(turn) * steps[None, :] + np.sin(turn) * steps[:, None]
    share = ((along - along.min()) / (along.max() - along.min()))[:, :, None]
    colours = np.rint(first * (1.0 - share) + second * share).astype(np.uint8)
    return Image.fromarray(colours).convert("RGBA")
