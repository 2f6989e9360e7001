"""Orthogonality loss between low-rank adapters (O-LoRA)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["absolute", "squared"]


def orthogonality_loss(past: Tensor, now: Tensor, measure: Measure = "absolute") -> Tensor:
    """Return the orthogonality loss: mean absolute or squared entry of ``past now^T``.

    O-LoRA, Wang et al. 2023, arXiv:2310.14152; both are their A transposed. Computed in float32 or
    wider, also under autocast, because entries of size 1/sqrt(d_in) would be lost in half
    precision.

    Args:
        past: (R, d_in) A of the past tasks, gets no gradient.
        now: (r, d_in) A of the current task.
        measure: size of an entry, "absolute" or "squared".

    Returns:
        Scalar, at least 0; 0 if all rows are orthogonal.
    """
    with torch.autocast(now.device.type, enabled=False):
        wide = torch.promote_types(now.dtype, torch.float32)
        products = past.detach().to(wide) @ now.to(wide).T
        return (products.abs() if measure == "absolute" else products.square()).mean()


def mean_over_layers(terms: Iterable[Tensor]) -> Tensor:
    """Return the mean of one scalar for each layer; there must be at least one."""
    return torch.stack(list(terms)).mean()
