"""Five looks of a handwritten digit: a model must adapt, a person reads them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageOps

PIXELS = 32
_INK, _PAPER = (50, 30, 130), (250, 215, 120)
_NOISE_DEVIATION = 70.0
_TURN_DEGREES = 40
_STRIPE_PERIOD, _STRIPE_WIDTH, _STRIPE_GREY = 8, 3, 150

Look = Callable[[Image.Image, np.random.Generator], Image.Image]
"""From a grey scan of any size and a generator of its own to a 32 x 32 RGB picture."""


def clean(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Enlarge the scan, white on black, and change nothing else."""
    return _enlarge(scan).convert("RGB")


def inverted(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Write in dark blue ink on yellow paper."""
    return ImageOps.colorize(_enlarge(scan), black=_PAPER, white=_INK)


def noisy(scan: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Add normal noise of deviation 70 (of 255), each colour by itself."""
    clear = np.asarray(clean(scan, draw), dtype=np.float64)
    noise = draw.normal(0.0, _NOISE_DEVIATION, clear.shape)
    return Image.fromarray(np.clip(clear + noise, 0, 255).astype(np.uint8))


def rotated(scan: Image.Image, _: np.random.Generator) -> Image.Image:
    """Turn by 40 degrees, counter-clockwise, and make it smaller so that no corner is cut off."""
    turned = _enlarge(scan).rotate(_TURN_DEGREES, Image.Resampling.BICUBIC, expand=True)
    return turned.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).convert("RGB")


def striped(scan: Image.Image, draw: np.random.Generator) -> Image.Image:
    """Hide three eighths of the picture under slanting grey bars that begin anywhere."""
    pixels = np.array(clean(scan, draw))
    start = int(draw.integers(_STRIPE_PERIOD))
    across = np.arange(PIXELS)[:, None] + np.arange(PIXELS)[None, :]
    pixels[(across + start) % _STRIPE_PERIOD < _STRIPE_WIDTH] = _STRIPE_GREY
    return Image.fromarray(pixels)


def _enlarge(scan: Image.Image) -> Image.Image:
    return scan.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


LOOKS: Mapping[str, Look] = {
    "clean": clean,
    "inverted": inverted,
    "noisy": noisy,
    "rotated": rotated,
    "striped": striped,
}
"""In the order of the tasks."""
