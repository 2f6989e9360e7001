"""Which samples to keep: pure functions that return indices.

Herding and k-centre are greedy and exact; they accumulate in float64, so that every rank, given
the same features, makes the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.core.model import expect_shape
from mmcl.core.randomness import generator, ranks_of


def lowest(ranks: Tensor, capacity: int, groups: Tensor | None = None) -> Tensor:
    """Choose the entries of smallest rank, in all or evenly over groups.

    Kept entries of a growing collection stay the right ones: choosing from (kept + new) equals
    choosing from everything ever seen, with and without groups.

    Args:
        ranks: (R,) int64, one pseudo-random number per entry.
        capacity: entries to choose at most.
        groups: (R,) int64, for example classes. Every group gets the same number, a small group
            leaves its rest to the others, and single places over go to the smallest ranks.

    Returns:
        (min(R, capacity),) int64 indices, the first to stay first.
    """
    order = torch.argsort(ranks, stable=True)
    if groups is not None:
        order = order[torch.argsort(_places_in_groups(groups[order]), stable=True)]
    return order[:capacity]


def _places_in_groups(groups: Tensor) -> Tensor:
    """Number the entries of each group 0, 1, ... in the order in which they stand."""
    by_group = torch.argsort(groups, stable=True)
    _, counts = torch.unique_consecutive(groups[by_group], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    places = torch.empty_like(by_group)
    places[by_group] = torch.arange(len(groups)) - starts
    return places


def reservoir(items: Tensor, capacity: int, seed: int) -> Tensor:
    """Choose a uniform sample without replacement.

    Args:
        items: (R,) int64 numbers that name the items; the choice follows them, not their order.
        capacity: items to choose at most.
        seed: of the choice.

    Returns:
        (min(R, capacity),) int64 indices into ``items``.

    Raises:
        ValueError: if ``capacity`` is below 1.
    """
    _expect_capacity(capacity)
    return lowest(ranks_of(seed, 0, items.cpu()), capacity)


def class_balanced(labels: Tensor, capacity: int, seed: int) -> Tensor:
    """Choose equally many of every class, uniformly inside a class.

    Args:
        labels: (R,) int64 class of each sample.
        capacity: samples to choose at most; what a small class leaves goes to the others.
        seed: of the choice.

    Returns:
        (min(R, capacity),) int64 indices.

    Raises:
        ValueError: if ``capacity`` is below 1.
    """
    _expect_capacity(capacity)
    return lowest(ranks_of(seed, 0, torch.arange(len(labels))), capacity, labels.cpu())


def herding(features: Tensor, capacity: int) -> Tensor:
    """Choose samples whose running mean stays closest to the mean of all, one by one.

    iCaRL, Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4, on the samples of one class;
    features are brought to unit length first, as there. Ties go to the lower index.

    Args:
        features: (R, D) of one class.
        capacity: samples to choose at most.

    Returns:
        (min(R, capacity),) int64 indices, most important first: any beginning of it is the
        herding of a smaller capacity.

    Raises:
        ValueError: if ``features`` is not (R, D) or ``capacity`` is below 1.
    """
    expect_shape("features", features, None, None)
    _expect_capacity(capacity)
    unit = torch.nn.functional.normalize(features.detach().double(), dim=1)
    mean = unit.mean(0) if len(unit) else unit.sum(0)
    total = torch.zeros_like(mean)
    is_free = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    chosen: list[int] = []
    for count in range(1, min(len(unit), capacity) + 1):
        distances = (mean - (total + unit) / count).square().sum(1)
        best = int(torch.where(is_free, distances, torch.inf).argmin())
        total += unit[best]
        is_free[best] = False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.int64)


def k_centre(features: Tensor, capacity: int, seed: int) -> Tensor:
    """Choose samples so that the farthest of the others is near to a chosen one.

    The greedy rule of the core-set paper, Sener and Savarese 2018, arXiv:1708.00489: after a
    seeded first, always the sample farthest from all chosen. At most twice the best radius.

    Args:
        features: (R, D), compared by Euclidean distance.
        capacity: samples to choose at most.
        seed: of the first sample.

    Returns:
        (min(R, capacity),) int64 indices, in the order chosen.

    Raises:
        ValueError: if ``features`` is not (R, D) or ``capacity`` is below 1.
    """
    expect_shape("features", features, None, None)
    _expect_capacity(capacity)
    if not len(features):
        return torch.zeros(0, dtype=torch.int64)
    points = features.detach().double()
    chosen = [int(torch.randint(len(points), (1,), generator=generator(seed)))]
    nearest = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < min(len(points), capacity):
        # A chosen point stands at -1, below every distance: copies of it are still chosen once.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen, dtype=torch.int64)


def _expect_capacity(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, expected at least 1: it counts what is kept")
