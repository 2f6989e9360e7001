"""Subset of a task's samples, seeded or evenly spaced, for a first try."""

from __future__ import annotations

import zlib
from typing import Literal

import numpy as np
import torch

from mmcl.core import Task
from mmcl.core.seeding import hash_priorities
from mmcl.data.protocols import IntArray


def expect_limit(limit: float | int | None) -> None:
    """Check that a limit is a number of samples or a fraction of them.

    Raises:
        ValueError: if it is not a whole number of 1 or more, or above 0 and at most 1.
    """
    if limit is None:
        return
    is_fraction = isinstance(limit, float) and 0 < limit <= 1
    is_count = not isinstance(limit, bool) and limit >= 1 and limit == int(limit)
    if not (is_fraction or is_count):
        raise ValueError(
            f"limit is {limit!r}, expected a whole number of samples such as 200, or a fraction "
            "such as 0.02"
        )


def subset_size(count: int, limit: float | int | None) -> int:
    """Return the size of the subset that a limit leaves of ``count`` samples."""
    if limit is None:
        return count
    if isinstance(limit, float) and limit <= 1:
        return min(count, max(1, round(limit * count)))
    return min(count, int(limit))


def subset_indices(
    task: Task, part: Literal["train", "test"], count: int, limit: float | int | None, seed: int
) -> IntArray | None:
    """Return the indices of a seeded random subset, in recorded order; None = all samples."""
    kept = subset_size(count, limit)
    if kept == count:
        return None
    group = zlib.crc32(f"{part}/{task.name}".encode())
    priorities = hash_priorities(seed, group, torch.arange(count))
    chosen: IntArray = priorities.argsort(stable=True)[:kept].sort().values.numpy()
    return chosen


def evenly_spaced(count: int, limit: float | int | None) -> IntArray:
    """Return the indices of a subset that is spaced evenly over ``count`` samples."""
    kept = subset_size(count, limit)
    return np.arange(kept, dtype=np.int64) * count // max(1, kept)
