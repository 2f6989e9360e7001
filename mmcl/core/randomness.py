"""Numbers that look random and are functions of what they are made for.

Everything drawn in mmcl (order, augmentation, what is kept) is computed from a seed and the
coordinates of its use, so nothing has to be remembered to go on exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash integers into one seed in [0, 2**63), by splitmix64 (Steele et al. 2014).

    Args:
        parts: any integers, for example seed, task, step and rank; their order matters.

    Returns:
        A non-negative int that fits int64; close inputs give unrelated outputs.
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state ^= state >> 27
        state = (state + 0x9E3779B97F4A7C15) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded with ``mix(*parts)``."""
    return torch.Generator().manual_seed(mix(*parts))


def ranks_of(seed: int, group: int, items: Tensor) -> Tensor:
    """Hash item numbers so that the k smallest are a uniform sample without replacement.

    Args:
        seed: of the draw.
        group: what the items belong to, for example a task.
        items: (R,) int64 numbers inside the group.

    Returns:
        (R,) int64 in [0, 2**63), one pseudo-random rank for each item, whatever else is asked.
    """
    # int64 products wrap in torch as they do in C, so this is splitmix64 on whole tensors.
    state = items.to(torch.int64) + mix(seed, group)
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return (state ^ ((state >> 31) & 0x1FFFFFFFF)) & 0x7FFFFFFFFFFFFFFF
