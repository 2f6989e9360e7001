"""Vectors cut into parts, each part replaced by the number of the nearest of 256 centroids.

Jégou et al. 2011, Product Quantization for Nearest Neighbor Search, IEEE TPAMI 33(1), section II;
Hayes et al. 2020 (REMIND), arXiv:1910.02509, replay features that are stored so. Their m is
``parts``, here S; their k* is K, their D* is D / S.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CENTROIDS = 256
_ROUNDS = 25
_VECTORS_TOGETHER = 4096


def learn_centroids(vectors: Tensor, parts: int, *, seed: int, rounds: int = _ROUNDS) -> Tensor:
    """Find centroids for each part of some vectors, by k-means.

    Begun as k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's rounds until nothing moves. A
    centroid that lost all its vectors goes to one of those that are farthest from theirs. Sums are
    float64 and the work is done on the CPU, so that it can be repeated to the bit; ranks that need
    the same centroids send them, since another processor may round otherwise.

    Args:
        vectors: (M, D) floats, in random order.
        parts: S, which divides D.
        seed: of the beginning.
        rounds: of Lloyd at most.

    Returns:
        (S, K, D / S) float32, K = 256, or M if that is less.

    Raises:
        ValueError: if there are no vectors or ``parts`` does not divide D.
    """
    expect_parts(vectors.shape[-1], parts)
    if not len(vectors):
        raise ValueError("there are 0 vectors to learn centroids from: give at least one")
    cut = vectors.detach().cpu().float().view(len(vectors), parts, -1).transpose(0, 1)
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([_k_means(part.contiguous(), draw, rounds) for part in cut])


def expect_parts(width: int, parts: int) -> None:
    """Check that vectors can be cut.

    Raises:
        ValueError: if ``parts`` does not divide ``width``.
    """
    if parts < 1 or width % parts:
        fitting = [str(count) for count in range(1, width + 1) if width % count == 0]
        raise ValueError(
            f"subvectors is {parts} and features are {width} wide: choose a number that divides "
            f"it, one of {', '.join(fitting)}"
        )


def encode(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the number of the nearest centroid for each part, (..., S) uint8.

    Args:
        vectors: (..., D) floats.
        centroids: (S, K, D / S) on the same device.
    """
    parts, _, width = centroids.shape
    cut = vectors.detach().float().reshape(-1, parts, width).transpose(0, 1)
    lengths, across = centroids.square().sum(-1)[:, None], centroids.transpose(1, 2)
    codes = [
        torch.baddbmm(lengths, piece, across, alpha=-2).argmin(-1).to(torch.uint8)
        for piece in cut.split(_VECTORS_TOGETHER, dim=1)  # type: ignore[no-untyped-call]
    ]
    return torch.cat(codes, 1).T.reshape(*vectors.shape[:-1], parts)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Return (..., D) float32, the centroids that the codes name side by side.

    Args:
        codes: (..., S) uint8.
        centroids: (S, K, D / S) on the same device.
    """
    parts, count, width = centroids.shape
    starts = torch.arange(parts, device=codes.device, dtype=torch.int32) * count
    rows = functional.embedding(codes.to(torch.int32) + starts, centroids.view(-1, width))
    return rows.flatten(-2)


def _k_means(vectors: Tensor, draw: torch.Generator, rounds: int) -> Tensor:
    """Return (K, d) centroids of (M, d) vectors."""
    centroids = _spread(vectors, draw)
    before = torch.zeros(0)
    for _ in range(rounds):
        distances, nearest = _nearest(vectors, centroids)
        if torch.equal(nearest, before):
            break
        before = nearest
        centroids = _means(vectors, nearest, distances, len(centroids))
    return centroids


def _spread(vectors: Tensor, draw: torch.Generator) -> Tensor:
    """Choose vectors, each with a chance in proportion to its squared distance from the chosen."""
    # The first ones of a random order are a random choice, and enough to begin with.
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
    """Return squared distances (M,) to the nearest centroid and its number (M,)."""
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
