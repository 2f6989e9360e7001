"""A seeded part of every task, for a first try."""

from __future__ import annotations

import zlib
from typing import Literal

import torch

from mmcl.core import Task
from mmcl.core.randomness import ranks_of
from mmcl.data.shard import Numbers


def expect_limit(limit: float | int | None) -> None:
    """Refuse what is neither a number of samples nor a share.

    Raises:
        ValueError: if it is not a whole number of 1 or more, or above 0 and at most 1.
    """
    if limit is None:
        return
    is_share = isinstance(limit, float) and 0 < limit <= 1
    is_count = not isinstance(limit, bool) and limit >= 1 and limit == int(limit)
    if not (is_share or is_count):
        raise ValueError(
            f"limit is {limit!r}, expected a whole number of samples such as 200, or a share "
            "such as 0.02"
        )


def limited(count: int, limit: float | int | None) -> int:
    """Return how many of ``count`` samples a limit leaves."""
    if limit is None:
        return count
    if isinstance(limit, float) and limit <= 1:
        return min(count, max(1, round(limit * count)))
    return min(count, int(limit))


def choice(
    task: Task, part: Literal["train", "test"], count: int, limit: float | int | None, seed: int
) -> Numbers | None:
    """Return the positions that the limit leaves, in recorded order; None = all."""
    kept = limited(count, limit)
    if kept == count:
        return None
    group = zlib.crc32(f"{part}/{task.name}".encode())
    ranks = ranks_of(seed, group, torch.arange(count))
    chosen: Numbers = ranks.argsort(stable=True)[:kept].sort().values.numpy()
    return chosen
