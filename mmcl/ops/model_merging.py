"""Merging of several sets of weights: averages, and arithmetic of task vectors.

A task vector is the difference of trained weights and a base. All functions take mappings
name -> tensor with the same names and shapes, compute in float32 (float64 for float64) and return
the dtype of the first set. Tensors that are not floating point (position ids, counters) are taken
from the last set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def expect_same_weights(sets: Sequence[Weights]) -> None:
    """Check that sets of weights can be merged.

    Raises:
        ValueError: naming the first difference in names, shapes or kind of dtype, or an empty list.
    """
    if not sets:
        raise ValueError("there are no weights to merge: give at least one set")
    first = sets[0]
    for number, other in enumerate(sets[1:], 2):
        missing = [name for name in first if name not in other]
        extra = [name for name in other if name not in first]
        if missing or extra:
            owner = f"1 and not in set {number}" if missing else f"{number} and not in set 1"
            raise ValueError(
                f"'{(missing or extra)[0]}' is in set {owner}: merge weights of one architecture"
            )
        for name, tensor in first.items():
            if tensor.shape != other[name].shape:
                raise ValueError(
                    f"'{name}' has shape {tuple(tensor.shape)} in set 1 and "
                    f"{tuple(other[name].shape)} in set {number}: merge weights of one architecture"
                )
            if tensor.is_floating_point() != other[name].is_floating_point():
                raise ValueError(
                    f"'{name}' is {tensor.dtype} in set 1 and {other[name].dtype} in set {number}: "
                    "merge weights of one kind"
                )


def average(sets: Sequence[Weights], shares: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted average of sets of weights (model soup).

    Wortsman et al. 2022, arXiv:2203.05482.

    Args:
        sets: at least one.
        shares: one per set, at least 0; they are divided by their sum. None = all equal.

    Raises:
        ValueError: if the sets or the number of shares do not fit.
    """
    expect_same_weights(sets)
    shares = [1.0] * len(sets) if shares is None else list(shares)
    total = sum(shares)
    if len(shares) != len(sets) or not total > 0 or min(shares) < 0 or total == float("inf"):
        raise ValueError(
            f"shares are {shares} for {len(sets)} sets of weights: give one per set, at least 0, "
            "not all 0"
        )

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        mean = torch.zeros_like(tensors[0])
        for share, tensor in zip(shares, tensors, strict=True):
            mean += share / total * tensor
        return mean

    return _merge(sets, combine)


def ema(sets: Sequence[Weights], share: float) -> dict[str, Tensor]:
    """Return the exponential moving average over sets in their order.

    ``mean_1 = w_1``, then ``mean_t = (1 - share) * mean_(t-1) + share * w_t``.

    Args:
        sets: at least one, oldest first.
        share: weight of the newest set, 0 to 1.

    Raises:
        ValueError: if the sets do not fit or ``share`` is out of range.
    """
    _expect_fraction("share", share)

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        mean = tensors[0]
        for tensor in tensors[1:]:
            mean = (1 - share) * mean + share * tensor
        return mean

    return _merge(sets, combine)


def wise(base: Weights, other: Weights, alpha: float) -> dict[str, Tensor]:
    """Return ``(1 - alpha) * base + alpha * other``, exact at both ends (WiSE-FT).

    Wortsman et al. 2021, arXiv:2109.01903.

    Raises:
        ValueError: if the sets do not fit or ``alpha`` is not 0 to 1.
    """
    _expect_fraction("alpha", alpha)
    return _merge([base, other], lambda name, both: (1 - alpha) * both[0] + alpha * both[1])


def task_arithmetic(
    base: Weights, others: Sequence[Weights], scale: float = 1.0
) -> dict[str, Tensor]:
    """Return ``base + scale * sum of task vectors``.

    Ilharco et al. 2022, arXiv:2212.04089; their lambda is ``scale``.

    Raises:
        ValueError: if the sets do not fit.
    """
    _expect_others(others)
    return _merge(
        [base, *others],
        lambda name, t: t[0] + scale * torch.stack([o - t[0] for o in t[1:]]).sum(0),
    )


def magmax(base: Weights, others: Sequence[Weights], scale: float = 1.0) -> dict[str, Tensor]:
    """Return ``base + scale * tau``, where tau has each entry of largest magnitude.

    MagMax, Marczak et al. 2024, arXiv:2407.06322. Of equal magnitudes the first set's is taken.

    Raises:
        ValueError: if the sets do not fit.
    """
    _expect_others(others)

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        chosen = tensors[1] - tensors[0]
        for other in tensors[2:]:
            vector = other - tensors[0]
            chosen = torch.where(vector.abs() > chosen.abs(), vector, chosen)
        return tensors[0] + scale * chosen

    return _merge([base, *others], combine)


def dare(
    base: Weights,
    others: Sequence[Weights],
    drop_rate: float = 0.9,
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return task arithmetic of task vectors whose entries are dropped at random and rescaled.

    DARE, Yu et al. 2023, arXiv:2311.03099: entries are zero with probability ``drop_rate``, the
    others are divided by ``1 - drop_rate``. The mask depends on the seed, the number of the set and
    the name alone.

    Raises:
        ValueError: if the sets do not fit or ``drop_rate`` is not in [0, 1).
    """
    _expect_others(others)
    if not 0 <= drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}: give 0 to less than 1")

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        total = torch.zeros_like(tensors[0])
        for number, other in enumerate(tensors[1:]):
            digest = hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            kept = torch.rand(other.shape, generator=generator) >= drop_rate
            total += (other - tensors[0]) * kept.to(other.device) / (1 - drop_rate)
        return tensors[0] + scale * total

    return _merge([base, *others], combine)


def ties(
    base: Weights, others: Sequence[Weights], density: float = 0.2, scale: float = 1.0
) -> dict[str, Tensor]:
    """Return ``base + scale * merged task vector`` of TIES: trim, elect signs, disjoint mean.

    Yadav et al. 2023, arXiv:2306.01708; their k is ``100 * density``. Of each whole task vector
    exactly ``round(density * entries)`` entries of largest magnitude stay, the first ones of equal
    magnitudes. The sign of an entry is that of its sum over sets; if the sum is zero, the sign that
    most entries have. The mean is over the sets that agree with the sign.

    Raises:
        ValueError: if the sets do not fit, ``density`` is not in (0, 1], or a weight is NaN.
    """
    _expect_others(others)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: give more than 0, at most 1")
    expect_same_weights([base, *others])
    names = [name for name, tensor in base.items() if tensor.is_floating_point()]
    vectors = []
    for other in others:
        parts = [(_wide(other[n]) - _wide(base[n])).flatten() for n in names]
        vectors.append(_trim(torch.cat(parts), density) if parts else torch.empty(0))
    total = torch.stack(vectors).sum(0)
    sign = total.sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    merged, count = torch.zeros_like(total), torch.zeros_like(total)
    for vector in vectors:
        agrees = vector * sign > 0
        merged += torch.where(agrees, vector, 0.0)
        count += agrees
    merged /= count.clamp(min=1)
    sizes = [base[name].numel() for name in names]
    vector_of = dict(zip(names, torch.split(merged, sizes), strict=True))
    return _merge(
        [base, *others], lambda name, t: t[0] + scale * vector_of[name].view_as(t[0]).to(t[0].dtype)
    )


def fisher(
    sets: Sequence[Weights], fishers: Sequence[Weights], floor: float = 1e-6
) -> dict[str, Tensor]:
    """Return the average of weights, each entry weighted by its Fisher information.

    Fisher merging, Matena and Raffel 2021, arXiv:2111.09832.

    Args:
        sets: at least one.
        fishers: one per set; name -> diagonal, in the shape of the weight, at least 0.
        floor: least Fisher information, above 0, so that entries that no task used are averaged.

    Raises:
        ValueError: if the sets do not fit, a diagonal is missing or negative, or ``floor`` is not
            positive.
    """
    if len(fishers) != len(sets) or not floor > 0:
        raise ValueError(
            f"{len(fishers)} Fisher diagonals for {len(sets)} sets of weights, with floor {floor}: "
            "give one per set, and a floor above 0"
        )

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        mean, total = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
        for number, (tensor, diagonals) in enumerate(zip(tensors, fishers, strict=True), 1):
            diagonal = diagonals.get(name)
            if (
                diagonal is None
                or diagonal.shape != tensor.shape
                or not bool((diagonal >= 0).all())
            ):
                raise ValueError(
                    f"the Fisher diagonal of '{name}' in set {number} is missing, negative or not "
                    f"of shape {tuple(tensor.shape)}: give one value of at least 0 per weight"
                )
            share = diagonal.to(tensor).clamp(min=floor)
            mean += share * tensor
            total += share
        return mean / total

    return _merge(sets, combine)


def _merge(
    sets: Sequence[Weights], combine: Callable[[str, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    expect_same_weights(sets)
    merged = {}
    for name, tensor in sets[0].items():
        if tensor.is_floating_point():
            device = tensor.device
            values = [_wide(each[name]).to(device) for each in sets]
            merged[name] = combine(name, values).to(tensor.dtype)
        else:
            merged[name] = sets[-1][name].clone()
    return merged


def _wide(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def _trim(vector: Tensor, density: float) -> Tensor:
    """Zero all entries but ``round(density * entries)`` of largest magnitude, first ones first."""
    if bool(vector.isnan().any()):
        raise ValueError("a task vector has NaN, which has no magnitude: leave that checkpoint out")
    kept = round(density * len(vector))
    if kept == 0:
        return torch.zeros_like(vector)
    magnitude = vector.abs()
    least = magnitude.kthvalue(len(vector) - kept + 1).values
    above = magnitude > least
    at_limit = (magnitude == least).nonzero().flatten()[: kept - int(above.sum())]
    above[at_limit] = True
    return torch.where(above, vector, 0.0)


def _expect_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: give 0 to 1")


def _expect_others(others: Sequence[Weights]) -> None:
    if not others:
        raise ValueError("there are no weights besides the base: give at least one set")
