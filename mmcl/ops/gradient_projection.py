"""Gradient projection (A-GEM) on gradients given as lists of tensors, one for each parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors, each given as a list of tensors.

    Args:
        left: at least one tensor, of any shape.
        right: tensors of the same shapes.

    Returns:
        Scalar float64; each tensor's product is computed in float32 or wider, then summed in
        float64.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    if not left or len(left) != len(right):
        raise ValueError(
            f"left has {len(left)} tensors and right has {len(right)}: "
            "give one gradient for each parameter on both sides"
        )
    parts = [_dot(mine, theirs) for mine, theirs in zip(left, right, strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return torch.dot(left.flatten().to(wide), right.flatten().to(wide)).double()


def agem_projection(
    gradients: Sequence[Tensor], reference: Sequence[Tensor]
) -> tuple[list[Tensor], bool]:
    """Return the A-GEM projection of a gradient: without the component against the reference.

    g - (g.r / r.r) r if g.r < 0, else g: the nearest gradient that does not increase the reference
    loss. A-GEM, Chaudhry et al. 2019, arXiv:1812.00420, equation 11; their g_ref is r. The vectors
    are never concatenated.

    Args:
        gradients: g, one tensor for each parameter, at least one.
        reference: r, tensors of the same shapes.

    Returns:
        The projected gradient (the given tensors themselves if there was no conflict), and whether
        it was changed.
    """
    along = dot(gradients, reference)
    length = dot(reference, reference)
    if not bool((along < 0) & (length > 0)):
        return list(gradients), False
    scale = along / length
    return [
        g - scale.to(device=r.device, dtype=r.dtype) * r
        for g, r in zip(gradients, reference, strict=True)
    ], True
