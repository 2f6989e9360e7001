"""Projection of gradients (A-GEM).

A file of its own, because equations are found by the name of their file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two vectors, each a list of tensors of the same shapes.

    Returns:
        Scalar float64; each tensor's product is computed in float32 or wider, then summed.

    Raises:
        ValueError: if the lists are empty or differ in length.
    """
    if not left or len(left) != len(right):
        raise ValueError(
            f"left has {len(left)} tensors and right has {len(right)}: "
            "give one gradient for each parameter on both sides"
        )
    products = []
    for mine, theirs in zip(left, right, strict=True):
        wide = torch.promote_types(torch.promote_types(mine.dtype, theirs.dtype), torch.float32)
        product = torch.dot(mine.flatten().to(wide), theirs.flatten().to(wide))
        products.append(product.to(left[0].device, torch.float64))
    return torch.stack(products).sum()


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
    scale, pairs = along / length, zip(gradients, reference, strict=True)
    return [g - scale.to(device=r.device, dtype=r.dtype) * r for g, r in pairs], True
