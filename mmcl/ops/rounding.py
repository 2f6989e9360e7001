"""Numbers in one byte: rounded, with a scale for each vector."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 127


def to_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round vectors to whole multiples, -127 to 127, of a scale of their own.

    The scale is the largest number of the vector over 127, rounded up to float16, so no number is
    cut off: each is at most half a scale away from what it was.

    Args:
        values: (..., D) floats, below 8 million.

    Returns:
        (..., D) int8 and scales (...) float16.
    """
    wide = values.detach().float()
    wanted = wide.abs().amax(-1) / _STEPS
    scale = wanted.half()
    # The next float16 upwards has the next number as its bits.
    higher = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(scale.float() < wanted, higher, scale)
    steps = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return (wide / steps).round().clamp(-_STEPS, _STEPS).to(torch.int8), scale


def from_int8(rounded: Tensor, scale: Tensor) -> Tensor:
    """Return (..., D) float32 of what ``to_int8`` made."""
    return rounded.float() * scale.float()[..., None]
