"""Selection of samples to keep: scores, orders and choices, as pure functions.

Herding and k-center are greedy and exact; they accumulate in float64, so that every rank, given
the same features, makes the same selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core.model import expect_shape
from mmcl.core.seeding import generator, hash_priorities

_HASH_CHUNK = 1 << 20


def smallest_priorities(priorities: Tensor, capacity: int, groups: Tensor | None = None) -> Tensor:
    """Select at most ``capacity`` entries of smallest priority, overall or evenly over groups.

    Selection from (kept + new) equals selection from everything ever seen, with and without groups.

    Args:
        priorities: (R,) int64, one pseudo-random number per entry.
        capacity: entries to select at most.
        groups: (R,) int64, for example classes. Every group gets the same number, a small group
            leaves its remainder to the others, and single entries over go to the smallest numbers.

    Returns:
        (min(R, capacity),) int64 indices, best first.
    """
    order = torch.argsort(priorities, stable=True)
    if groups is not None:
        order = order[torch.argsort(positions_in_groups(groups[order]), stable=True)]
    return order[:capacity]


def positions_in_groups(groups: Tensor) -> Tensor:
    """Return each entry's position inside its group: 0, 1, ... in the order given."""
    by_group = torch.argsort(groups, stable=True)
    _, counts = torch.unique_consecutive(groups[by_group], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    positions = torch.empty_like(by_group)
    positions[by_group] = torch.arange(len(groups)) - starts
    return positions


def smallest_priorities_in_range(
    size: int, capacity: int, seed: int, group: int, *, bound: int | None = None
) -> Tensor:
    """Select among the items 0 to size - 1 those of smallest hash, without a list of them all.

    The range is hashed in chunks; at most twice the capacity is held, and a chunk.

    Args:
        size: number of items.
        capacity: items to select at most, 0 = all.
        seed: of the hash.
        group: of the items, for example a task.
        bound: items of this hash and above are left out.

    Returns:
        (at most capacity,) int64 item numbers, rising.
    """
    largest = torch.iinfo(torch.int64).max if bound is None else bound
    priorities, items = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for start in range(0, size, _HASH_CHUNK):
        chunk = torch.arange(start, min(size, start + _HASH_CHUNK))
        hashes = hash_priorities(seed, group, chunk)
        is_low = torch.nonzero(hashes < largest).flatten()
        priorities = torch.cat([priorities, hashes[is_low]])
        items = torch.cat([items, chunk[is_low]])
        is_full = bool(capacity) and len(priorities) > max(2 * capacity, _HASH_CHUNK // 64)
        if is_full or (capacity and start + _HASH_CHUNK >= size and len(priorities) > capacity):
            priorities, order = torch.topk(priorities, capacity, largest=False, sorted=False)
            items, largest = items[order], int(priorities.max())
    return items.sort().values


def herding(features: Tensor, capacity: int) -> Tensor:
    """Select exemplars by herding: their running mean stays closest to the mean of all samples.

    iCaRL, Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4, on the samples of one class;
    features are normalized first, as there. Ties go to the lower index.

    Args:
        features: (R, D) of one class.
        capacity: samples to select at most, 1 or more.

    Returns:
        (min(R, capacity),) int64 indices, most important first: every prefix is the herding of a
        smaller capacity.

    Raises:
        ValueError: if ``features`` is not (R, D) or ``capacity`` is below 1.
    """
    _expect_features(features, capacity)
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


def k_center_greedy(features: Tensor, capacity: int, seed: int) -> Tensor:
    """Select samples by greedy k-center: the largest distance to a selected sample is small.

    The greedy rule of the core-set paper, Sener and Savarese 2018, arXiv:1708.00489: after a
    seeded first, always the sample farthest from all selected. At most twice the optimal radius.

    Args:
        features: (R, D), compared by Euclidean distance.
        capacity: samples to select at most.
        seed: of the first sample.

    Returns:
        (min(R, capacity),) int64 indices, in the order of selection.

    Raises:
        ValueError: if ``features`` is not (R, D) or ``capacity`` is below 1.
    """
    _expect_features(features, capacity)
    if not len(features):
        return torch.zeros(0, dtype=torch.int64)
    points = features.detach().double()
    lengths = points.square().sum(1)

    def squares_from(index: int) -> Tensor:
        return (lengths + lengths[index] - 2 * (points @ points[index])).clamp(min=0)

    chosen = [int(torch.randint(len(points), (1,), generator=generator(seed)))]
    nearest = squares_from(chosen[0])
    while len(chosen) < min(len(points), capacity):
        # -1 is below every distance, so a selected point is not selected again, its copies are.
        nearest[chosen[-1]] = -1.0
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, squares_from(chosen[-1]))
    return torch.tensor(chosen, dtype=torch.int64)


def _expect_features(features: Tensor, capacity: int) -> None:
    expect_shape("features", features, None, None)
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}, expected at least 1")


ScoreOrder = Literal["high", "low", "spread"]


def order_by_score(scores: Tensor, keep: ScoreOrder) -> Tensor:
    """Order samples by a score, for example their loss.

    Args:
        scores: (R,) one number for each; equal ones stay in the order given.
        keep: "high" puts the largest first, "low" the smallest; "spread" takes some of every
            score, so that every prefix of the order is evenly spaced over the sorted scores to a
            factor of two. Rainbow Memory, Bang et al. 2021, arXiv:2103.17230, takes every
            (R / k)-th of the sorted list, which is the same where R and k are powers of two.

    Returns:
        (R,) int64 indices, best first.

    Raises:
        ValueError: if ``keep`` is none of the three or a score is not a number.
    """
    if keep not in ("high", "low", "spread"):
        raise ValueError(f"keep is '{keep}': choose 'high', 'low' or 'spread'")
    if bool(torch.isnan(scores).any()):
        raise ValueError(
            f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are nan: check for "
            "samples without a scored token, or for weights that are nan"
        )
    order = torch.argsort(scores, descending=keep == "high", stable=True)
    return order[van_der_corput_order(len(order))] if keep == "spread" else order


def van_der_corput_order(count: int) -> Tensor:
    """Return 0 to count - 1 in van der Corput order, in which every prefix is evenly spread.

    Numbers by reversed bits, van der Corput 1935: 0, 1/2, 1/4, 3/4, 1/8 ... of the next power of 2.
    """
    bits = max(0, count - 1).bit_length()
    numbers = torch.arange(1 << bits)
    reversed_bits = torch.zeros_like(numbers)
    for bit in range(bits):
        reversed_bits |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return reversed_bits[reversed_bits < count]


def order_within_groups(
    groups: Tensor, order_of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Order every group separately.

    Args:
        groups: (R,) int64, for example classes.
        order_of: called with the indices of a group's members; returns the wanted ones as positions
            in its argument, best first.

    Returns:
        (wanted,) int64 indices and (wanted,) int64 position of each in its group's order.
    """
    indices, positions = [groups[:0]], [groups[:0]]
    for group in torch.unique(groups).tolist():
        members = torch.nonzero(groups == group).flatten()
        order = order_of(members)
        indices.append(members[order.to(members.device)])
        positions.append(torch.arange(len(order)))
    return torch.cat(indices), torch.cat(positions)


def order_by_information(information: Tensor, instructions: Tensor) -> Tensor:
    """Order samples so that instructions occur in proportion to their information.

    First one sample of every instruction, the most informative first; then by Webster's rule, so
    that m samples contain an instruction about m times its fraction of the sum. InsCL, Wang et al.
    2024, arXiv:2403.11435, draws as many of each, and one at least.

    Args:
        information: (R,) of each sample's instruction, 0 or more.
        instructions: (R,) int64, which instruction each sample has.

    Returns:
        (R,) int64 indices; inside an instruction samples stay in the order given.
    """
    turn = positions_in_groups(instructions).double()
    order = torch.argsort(information, descending=True, stable=True)
    wait = torch.where(turn > 0, (turn + 0.5) / information.double().clamp(min=1e-12), 0.0)
    return order[torch.argsort(wait[order], stable=True)]


def largest_remainder(total: int, weights: Tensor) -> Tensor:
    """Divide a total in proportion to weights, by largest remainders.

    Args:
        total: number to divide.
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
    remaining = total - int(counts.sum())
    first = torch.argsort(exact - counts, descending=True, stable=True)[:remaining]
    counts[first] += 1
    return counts


def inscl_counts(total: int, distances: Mapping[int, float]) -> dict[int, int]:
    """Allocate replayed samples to earlier tasks in proportion to their distance.

    InsCL, Wang et al. 2024, arXiv:2403.11435: a fraction W_j / (sum of all W) for a task at
    distance W_j.

    Args:
        total: number of replayed samples.
        distances: task -> its distance from the current one, 0 or more up to rounding.
    """
    weights = torch.tensor(list(distances.values()), dtype=torch.float64).clamp(min=0)
    return dict(zip(distances, largest_remainder(total, weights).tolist(), strict=True))


def repeat_to_counts(tasks: Tensor, counts: Mapping[int, int]) -> Tensor:
    """Return indices into a buffer, repeated so that each task has a given count.

    Args:
        tasks: (R,) int64 task of each sample held, best first inside a task.
        counts: task -> number of replayed samples; 0 leaves a task out.

    Returns:
        (sum of counts,) int64 rising indices. The samples of a task are repeated equally often, and
        its first ones once more where that does not divide.
    """
    listed = [tasks[:0]]
    for task, count in counts.items():
        own = torch.nonzero(tasks == task).flatten()
        if len(own):
            listed.append(own[torch.arange(count) % len(own)])
    return torch.cat(listed).sort().values


def sample_losses(
    logits: Tensor, targets: Tensor, sample_index: Tensor | None = None, count: int = 0
) -> Tensor:
    """Return the cross-entropy loss of each sample.

    Args:
        logits: (B, C) class scores, or (S, V) token scores.
        targets: (B,) int64 target classes, or (S,) int64 target tokens.
        sample_index: (S,) int64 index of each token's sample; None for class scores.
        count: B, number of samples; only read with ``sample_index``.

    Returns:
        (B,) float64; with ``sample_index``, each sample's mean over tokens, nan without tokens.
    """
    logits = logits.detach().float()
    losses = functional.cross_entropy(logits, targets, reduction="none").double()
    return losses if sample_index is None else _means(losses, sample_index, count)


def sample_entropies(logits: Tensor, sample_index: Tensor | None = None, count: int = 0) -> Tensor:
    """Return the entropy of the predicted distribution of each sample, in nats.

    Args:
        logits: (B, C) class scores, -inf for masked classes; or (S, V) token scores.
        sample_index: (S,) int64 index of each token's sample; None for class scores.
        count: B, number of samples; only read with ``sample_index``.

    Returns:
        (B,) float64; with ``sample_index``, each sample's mean over tokens, nan without tokens.
    """
    known = functional.log_softmax(logits.detach().float(), dim=-1)
    parts = torch.where(torch.isfinite(known), -known.exp() * known, 0.0)
    entropies = parts.double().sum(-1)
    return entropies if sample_index is None else _means(entropies, sample_index, count)


def tag_information(tags: Tensor) -> Tensor:
    """Return the tag information of each instruction: high for rare tags, low for common ones.

    InsInfo of InsCL, Wang et al. 2024, arXiv:2403.11435: the sum over an instruction's tags of
    log(N / f), where f of N instructions have the tag.

    Args:
        tags: (N, K) int64 tags of each instruction, without repeats; -1 = no tag.

    Returns:
        (N,) float64, 0 or more.
    """
    is_tag = tags >= 0
    if not bool(is_tag.any()):
        return torch.zeros(len(tags), dtype=torch.float64)
    _, index, counts = torch.unique(tags[is_tag], return_inverse=True, return_counts=True)
    information = torch.zeros(tags.shape, dtype=torch.float64)
    information[is_tag] = (len(tags) / counts.double()).log()[index]
    return information.sum(1)


def _means(values: Tensor, sample_index: Tensor, count: int) -> Tensor:
    """Return the mean of each sample's values, (count,); nan for a sample without values."""
    sums = values.new_zeros(count).index_add(0, sample_index, values)
    return sums / torch.bincount(sample_index, minlength=count)
