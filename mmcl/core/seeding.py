"""Seeds and pseudo-random numbers as functions of what they are drawn for.

Everything drawn in mmcl (order, augmentation, which samples are kept) is computed from a seed and
the coordinates of its use, so an exact resume needs no stored generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Constants of splitmix64 (Steele et al. 2014)."""


def hash_seed(*parts: int) -> int:
    """Hash integers into one seed in [0, 2**63), with the rounds of splitmix64.

    Args:
        parts: any integers, for example seed, task, step and rank; their order matters.

    Returns:
        A non-negative int that fits int64; close inputs give unrelated outputs.
    """
    state = _GAMMA
    for part in parts:
        state = (state ^ (part & _MASK)) * _FIRST & _MASK
        state ^= state >> 27
        state = (state + _GAMMA) * _SECOND & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded with ``hash_seed(*parts)``."""
    return torch.Generator().manual_seed(hash_seed(*parts))


def splitmix64(state: Tensor) -> Tensor:
    """Hash every number of an int64 tensor by the finalizer of splitmix64, a bijection.

    The bits are those of the uint64 function: products wrap in torch as they do in C.
    """
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * (_FIRST - (1 << 64))
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * (_SECOND - (1 << 64))
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def hash_priorities(seed: int, group: int, items: Tensor) -> Tensor:
    """Hash item numbers to priorities; the items of the k smallest are a uniform sample of k.

    The sample is drawn without replacement.

    Args:
        seed: seed of the draw.
        group: what the items belong to, for example a task.
        items: (R,) int64 numbers inside the group.

    Returns:
        (R,) int64 in [0, 2**63), one priority for each item, whatever the other items are.
    """
    return splitmix64(items.to(torch.int64) + hash_seed(seed, group)) & 0x7FFFFFFFFFFFFFFF
