"""What every layer that corrects a frozen linear one needs to know of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


def corrected(
    frozen: nn.Module, x: Tensor, dropout: float, correction: Callable[..., Tensor], *rest: Any
) -> Tensor:
    """Return a frozen layer's answer plus a correction, in one go where the layer is plain.

    Args:
        frozen: maps (..., d_in) to (..., d_out).
        x: (..., d_in).
        dropout: share of x that the correction does not see, 0 to 1.
        correction: one of ``mmcl.ops.low_rank``, called as (x, weight, bias, *rest).
        rest: what it takes after the bias.

    Returns:
        (..., d_out).
    """
    if dropout == 0 and is_plain(frozen):
        return correction(x, frozen.weight, frozen.bias, *rest)
    out = cast(Tensor, frozen(x))
    seen = functional.dropout(x, dropout) if dropout else x
    return out + correction(seen, None, None, *rest).to(out.dtype)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is torch's own linear, with floating weights, and nobody listens to it.

    Hooks and a replaced ``forward`` (statistics, weights that live elsewhere) want their call.
    """
    return (
        type(layer) is nn.Linear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and "forward" not in vars(layer)
        and layer.weight.is_floating_point()
    )


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer.

    Raises:
        TypeError: if it does not say.
    """
    wide = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not isinstance(wide[0], int) or not isinstance(wide[1], int):
        raise TypeError(
            f"{type(layer).__name__} has no in_features and out_features: give a linear layer"
        )
    return wide[0], wide[1]


def learning_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which corrections of a weight learn: float32, or float64 for float64.

    Updates of a small learning rate vanish in the rounding of narrower floats.
    """
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def draw_uniform(rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw (rows, width) float32 as torch and peft start a linear map, on the CPU.

    Kaiming's uniform with a = sqrt 5 is uniform in plus or minus 1 / sqrt(width).
    """
    bound = 1 / math.sqrt(width)
    return torch.empty(rows, width).uniform_(-bound, bound, generator=generator)
