"""How much two low-rank corrections read from the same directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["absolute", "squared"]


def overlap(past: Tensor, now: Tensor, measure: Measure = "absolute") -> Tensor:
    """Return the mean over the entries of ``past now^T``, absolute or squared; 0 is orthogonal.

    O-LoRA, Wang et al. 2023, arXiv:2310.14152; both are their A transposed. Computed in float32 or
    wider, also under autocast, because entries of 1/sqrt(d_in) vanish in the rounding of halves.

    Args:
        past: (R, d_in), gets no gradient.
        now: (r, d_in).
        measure: of an entry.

    Returns:
        A scalar, 0 or more.
    """
    with torch.autocast(now.device.type, enabled=False):
        wide = torch.promote_types(now.dtype, torch.float32)
        likeness = past.detach().to(wide) @ now.to(wide).T
        return (likeness.abs() if measure == "absolute" else likeness.square()).mean()


def mean_of(terms: Iterable[Tensor]) -> Tensor:
    """Return the mean of scalars, one for each layer.

    Args:
        terms: at least one.
    """
    return torch.stack(list(terms)).mean()
