"""Product quantization: each of S subvectors is replaced by the code of its nearest centroid.

Jégou et al. 2011, Product Quantization for Nearest Neighbor Search, IEEE TPAMI 33(1), section II;
Hayes et al. 2020 (REMIND), arXiv:1910.02509, store features for replay in this form. Their m is
``subvectors``, here S; their k* is K, their D* is D / S.

The k-means here is not that of ``ops.routing``: it runs on the CPU in float32 over many vectors,
always returns K centroids and moves those that lost all their vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CENTROIDS = 256
_ROUNDS = 25
_VECTORS_TOGETHER = 4096


def fit_centroids(vectors: Tensor, subvectors: int, *, seed: int, rounds: int = _ROUNDS) -> Tensor:
    """Compute the centroids of each subvector by k-means.

    k-means++ start (Arthur and Vassilvitskii 2007), then Lloyd iterations until no assignment
    changes. A centroid that lost all its vectors moves to one of the vectors farthest from their
    centroids. Sums are float64 on the CPU, so the result is repeatable to the bit on one machine;
    ranks that need the same centroids must broadcast them, since processors may round differently.

    Args:
        vectors: (M, D) floats, in random order.
        subvectors: S, number of subvectors; divides D.
        seed: seed of the start.
        rounds: Lloyd iterations, at most.

    Returns:
        (S, K, D / S) float32, K = 256, or M if that is less.

    Raises:
        ValueError: if there are no vectors or ``subvectors`` does not divide D.
    """
    expect_subvectors(vectors.shape[-1], subvectors)
    if not len(vectors):
        raise ValueError("there are 0 vectors to compute centroids from: give at least one")
    cut = vectors.detach().cpu().float().view(len(vectors), subvectors, -1).transpose(0, 1)
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([_k_means(one.contiguous(), draw, rounds) for one in cut])


def expect_subvectors(dim: int, subvectors: int) -> None:
    """Check that the number of subvectors divides the feature dim.

    Raises:
        ValueError: naming the divisors if ``subvectors`` does not divide ``dim``.
    """
    if subvectors < 1 or dim % subvectors:
        fitting = [str(count) for count in range(1, dim + 1) if dim % count == 0]
        raise ValueError(
            f"subvectors is {subvectors} and features have dim {dim}: choose a number that divides "
            f"it, one of {', '.join(fitting)}"
        )


def encode(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the codes (..., S) uint8: the number of the nearest centroid of each subvector.

    Args:
        vectors: (..., D) floats.
        centroids: (S, K, D / S) on the same device.
    """
    subvectors, _, dim = centroids.shape
    cut = vectors.detach().float().reshape(-1, subvectors, dim).transpose(0, 1)
    lengths, across = centroids.square().sum(-1)[:, None], centroids.transpose(1, 2)
    codes = [
        torch.baddbmm(lengths, piece, across, alpha=-2).argmin(-1).to(torch.uint8)
        for piece in cut.split(_VECTORS_TOGETHER, dim=1)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(codes, 1).T.reshape(*vectors.shape[:-1], subvectors)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Return the vectors (..., D) float32 of codes: the concatenated centroids.

    Args:
        codes: (..., S) uint8.
        centroids: (S, K, D / S) on the same device.
    """
    subvectors, count, dim = centroids.shape
    starts = torch.arange(subvectors, device=codes.device, dtype=torch.int32) * count
    rows = functional.embedding(codes.to(torch.int32) + starts, centroids.view(-1, dim))
    return rows.flatten(-2)


def _k_means(vectors: Tensor, draw: torch.Generator, rounds: int) -> Tensor:
    """Return (K, d) centroids of (M, d) vectors."""
    centroids = _k_means_plus_plus(vectors, draw)
    before = torch.zeros(0)
    for _ in range(rounds):
        distances, nearest = _nearest(vectors, centroids)
        if torch.equal(nearest, before):
            break
        before = nearest
        centroids = _means(vectors, nearest, distances, len(centroids))
    return centroids


def _k_means_plus_plus(vectors: Tensor, draw: torch.Generator) -> Tensor:
    """Return the k-means++ start: drawn in proportion to squared distance from those before."""
    # The vectors are in random order, so the first ones are a random subset.
    some = vectors[: 16 * CENTROIDS]
    first = int(torch.randint(len(some), (1,), generator=draw))
    chosen, nearest = [first], (some - some[first]).square().sum(1).double()
    for _ in range(min(CENTROIDS, len(some)) - 1):
        reach = nearest.cumsum(0)
        point = torch.rand(1, generator=draw, dtype=torch.float64) * reach[-1]
        chosen.append(min(int(torch.searchsorted(reach, point, right=True)), len(some) - 1))
        nearest = torch.minimum(nearest, (some - some[chosen[-1]]).square().sum(1))
    return some[chosen]


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared distance (M,) to the nearest centroid, and its number (M,)."""
    lengths = centroids.square().sum(1)
    best = torch.addmm(lengths, vectors, centroids.T, alpha=-2).min(1)
    return best.values + vectors.square().sum(1), best.indices


def _means(vectors: Tensor, nearest: Tensor, distances: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64)
    sums.index_add_(0, nearest, vectors.double())
    sizes = nearest.bincount(minlength=count)
    means = (sums / sizes.clamp(min=1)[:, None]).float()
    empty = torch.nonzero(sizes == 0).flatten()
    if len(empty):
        means[empty] = vectors[distances.topk(len(empty)).indices]
    return means
