"""Equations on gradients, given as lists of tensors that stand for one long vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors given in pieces.

    Args:
        left: pieces of any shape; there must be at least one.
        right: pieces of the same shapes.

    Returns:
        Scalar float64; products are taken in float32 or wider, pieces are summed in float64.

    Raises:
        ValueError: if the numbers of pieces differ or are 0.
    """
    if not left or len(left) != len(right):
        raise ValueError(
            f"left has {len(left)} pieces and right has {len(right)}: "
            "give one gradient for each parameter on both sides"
        )
    parts = [_dot(mine, theirs) for mine, theirs in zip(left, right, strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return torch.dot(left.flatten().to(wide), right.flatten().to(wide)).double()


def project_away(
    gradients: Sequence[Tensor], reference: Sequence[Tensor]
) -> tuple[list[Tensor], bool]:
    """Remove from a gradient the part that would raise the reference loss.

    g - (g.r / r.r) r where g.r < 0, else g: the nearest gradient that does not point against the
    reference. A-GEM, Chaudhry et al. 2019, arXiv:1812.00420, equation 11; their g_ref is r. The
    vectors are never concatenated.

    Args:
        gradients: g in pieces, one per parameter, at least one.
        reference: r in pieces of the same shapes.

    Returns:
        The gradient in pieces (the given tensors themselves where nothing was in conflict), and
        whether it was changed.
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
