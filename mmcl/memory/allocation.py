"""How many samples of each earlier task come back while a task is learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def divided(total: int, weights: Tensor) -> Tensor:
    """Divide a number of places in proportion to weights, by largest remainders.

    Args:
        total: places.
        weights: (T,) 0 or more; all 0 counts as all equal.

    Returns:
        (T,) int64 that sum to ``total``; ties go to the lower index.

    Raises:
        ValueError: if a weight is negative or not a number.
    """
    weights = weights.double()
    if not bool((weights >= 0).all()):
        raise ValueError(f"weights are {weights.tolist()}, expected numbers of 0 or more")
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    exact = weights / weights.sum() * total
    counts = exact.floor().long()
    left = total - int(counts.sum())
    first = torch.argsort(exact - counts, descending=True, stable=True)[:left]
    counts[first] += 1
    return counts


def by_distance(total: int, distances: Mapping[int, float]) -> dict[int, int]:
    """Give earlier tasks more places the further they lie from the present one.

    InsCL, Wang et al. 2024, arXiv:2403.11435: W_j / (sum of all W) of them for a task W_j away.

    Args:
        total: places.
        distances: task -> how far it lies from the present one, 0 or more but for rounding.
    """
    weights = torch.tensor(list(distances.values()), dtype=torch.float64).clamp(min=0)
    return dict(zip(distances, divided(total, weights).tolist(), strict=True))


def repeated(tasks: Tensor, counts: Mapping[int, int]) -> Tensor:
    """List the places of a memory so that each task comes as often as it should.

    Args:
        tasks: (R,) int64 task of each sample held, the first to stay first inside a task.
        counts: task -> how often its samples come, all together; 0 leaves a task out.

    Returns:
        (sum of counts,) int64 places in rising order. The samples of a task come equally often,
        and its first ones once more where that does not divide.
    """
    listed = [tasks[:0]]
    for task, count in counts.items():
        own = torch.nonzero(tasks == task).flatten()
        if len(own):
            listed.append(own[torch.arange(count) % len(own)])
    return torch.cat(listed).sort().values
