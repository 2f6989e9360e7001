"""Which samples to keep: pure functions that return indices.

Herding and k-centre are greedy and exact; they accumulate in float64, so that every rank, given
the same features, makes the same choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmcl.core.model import expect_shape
from mmcl.core.randomness import generator, ranks_of

_PIECE = 1 << 20


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


def lowest_of_range(
    size: int, capacity: int, seed: int, group: int, *, bound: int | None = None
) -> Tensor:
    """Choose among the items 0 to size - 1 those of smallest hash, without a list of them all.

    A piece of the range is hashed at a time, and of it only what lies below the largest hash kept
    so far is looked at again; at most twice the capacity is held, and a piece.

    Args:
        size: number of items.
        capacity: items to choose at most, 0 = all.
        seed: of the hash.
        group: what the items belong to, for example a task.
        bound: items of this hash and above are not wanted.

    Returns:
        (at most capacity,) int64 item numbers, rising.
    """
    largest = torch.iinfo(torch.int64).max if bound is None else bound
    ranks, items = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for start in range(0, size, _PIECE):
        piece = torch.arange(start, min(size, start + _PIECE))
        hashes = ranks_of(seed, group, piece)
        is_low = torch.nonzero(hashes < largest).flatten()
        ranks = torch.cat([ranks, hashes[is_low]])
        items = torch.cat([items, piece[is_low]])
        is_full = bool(capacity) and len(ranks) > max(2 * capacity, _PIECE // 64)
        if is_full or (capacity and start + _PIECE >= size and len(ranks) > capacity):
            ranks, order = torch.topk(ranks, capacity, largest=False, sorted=False)
            items, largest = items[order], int(ranks.max())
    return items.sort().values


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
    # |count * mean - total - unit|^2, the part that differs between candidates: no (R, D) is made.
    penalties = unit.square().sum(1)
    total = torch.zeros_like(mean)
    chosen: list[int] = []
    for count in range(1, min(len(unit), capacity) + 1):
        best = int((penalties - 2 * (unit @ (count * mean - total))).argmin())
        total += unit[best]
        penalties[best] = torch.inf
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
    lengths = points.square().sum(1)

    def squares_from(place: int) -> Tensor:
        return (lengths + lengths[place] - 2 * (points @ points[place])).clamp(min=0)

    chosen = [int(torch.randint(len(points), (1,), generator=generator(seed)))]
    nearest = squares_from(chosen[0])
    while len(chosen) < min(len(points), capacity):
        # A chosen point stands at -1, below every distance: copies of it are still chosen once.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, squares_from(chosen[-1]))
    return torch.tensor(chosen, dtype=torch.int64)


def _expect_capacity(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, expected at least 1: it counts what is kept")
