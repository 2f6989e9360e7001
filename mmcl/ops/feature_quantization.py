"""Quantization of features for replay: int8 with a scale for each vector, or product codes.

In product quantization each of S subvectors is replaced by the code of its nearest centroid. Jégou
et al. 2011, IEEE TPAMI 33(1), section II; REMIND, Hayes et al. 2020, arXiv:1910.02509. Their m is
``subvectors``, here S; their k* is K, their D* is D / S. Its k-means is not ``ops.routing``'s:
it runs on the CPU in float32, always returns K centroids and moves those that lost all vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal, get_args

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
    with torch.autocast("cpu", enabled=False):
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
    """Return the codes (..., S) uint8 of vectors (..., D): the nearest centroid of each subvector.

    The centroids (S, K, D / S) are on the same device.
    """
    subvectors, _, dim = centroids.shape
    cut = vectors.detach().float().reshape(-1, subvectors, dim).transpose(0, 1)
    lengths, across = centroids.square().sum(-1)[:, None], centroids.transpose(1, 2)
    with torch.autocast(vectors.device.type, enabled=False):
        codes = [
            torch.baddbmm(lengths, piece, across, alpha=-2).argmin(-1).to(torch.uint8)
            for piece in cut.split(_VECTORS_TOGETHER, dim=1)  # type: ignore[no-untyped-call]
        ]
    return torch.cat(codes, 1).T.reshape(*vectors.shape[:-1], subvectors)


def decode(codes: Tensor, centroids: Tensor) -> Tensor:
    """Return the vectors (..., D) float32 of codes (..., S): the concatenated centroids."""
    subvectors, count, dim = centroids.shape
    starts = torch.arange(subvectors, device=codes.device, dtype=torch.int32) * count
    rows = functional.embedding(codes.to(torch.int32) + starts, centroids.view(-1, dim))
    return rows.flatten(-2)


def _k_means(vectors: Tensor, draw: torch.Generator, rounds: int) -> Tensor:
    """Return (K, d) centroids of (M, d) vectors."""
    centroids = _k_means_plus_plus(vectors, draw)
    before = torch.zeros(0)
    for _ in range(rounds):
        lengths = centroids.square().sum(1)
        best = torch.addmm(lengths, vectors, centroids.T, alpha=-2).min(1)
        distances, nearest = best.values + vectors.square().sum(1), best.indices
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


def _means(vectors: Tensor, nearest: Tensor, distances: Tensor, count: int) -> Tensor:
    sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64)
    sums.index_add_(0, nearest, vectors.double())
    sizes = nearest.bincount(minlength=count)
    means = (sums / sizes.clamp(min=1)[:, None]).float()
    empty = torch.nonzero(sizes == 0).flatten()
    if len(empty):
        means[empty] = vectors[distances.topk(len(empty)).indices]
    return means


_STEPS = 127


def quantize_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize vectors to int8 multiples, -127 to 127, of one scale for each vector.

    The scale is the largest absolute number of the vector over 127, rounded up to float16, so
    nothing is clipped: the error of each number is at most half a scale.

    Args:
        values: (..., D) floats below 8 million in size.

    Returns:
        (..., D) int8 and scales (...) float16.
    """
    wide = values.detach().float()
    wanted = wide.abs().amax(-1) / _STEPS
    scale = wanted.half()
    # The bits of the next larger float16 are the next integer.
    higher = (scale.view(torch.int16) + 1).view(torch.float16)
    scale = torch.where(scale.float() < wanted, higher, scale)
    steps = scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return (wide / steps).round().clamp(-_STEPS, _STEPS).to(torch.int8), scale


def dequantize_int8(rounded: Tensor, scale: Tensor) -> Tensor:
    """Dequantize the result of ``quantize_int8`` to (..., D) float32."""
    return rounded.float() * scale.float()[..., None]


Compression = Literal["float16", "int8", "pq"]
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
PACKED = ("features", "codes", "scale")
"""Columns that quantized features may have."""
_LARGEST = torch.finfo(torch.float16).max


def pack(
    features: Tensor, compression: Compression, centroids: Tensor | None = None
) -> dict[str, Tensor]:
    """Quantize features to the columns of a buffer.

    Args:
        features: (B, N, D) floats.
        compression: "float16" = rounded; "int8" = one byte a number and a scale for each token;
            "pq" = product-quantized after dividing each token by its root mean square, which is
            stored apart: zeros stay zeros, and centroids are independent of the tokens' norms.
        centroids: (S, K, D / S), for "pq" only.

    Returns:
        name -> column: ``features`` (B, N, D) float16; or ``features`` (B, N, D) int8 and
        ``scale`` (B, N) float16; or ``codes`` (B, N, S) uint8 and ``scale`` (B, N) float16.

    Raises:
        ValueError: if ``compression`` is "pq" and there are no centroids.
    """
    if compression == "float16":
        return {"features": features.detach().to(torch.float16)}
    if compression == "int8":
        rounded, scale = quantize_int8(features)
        return {"features": rounded, "scale": scale}
    unit, scale = rms_normalize(features)
    return {"codes": encode(unit, _known(centroids).to(unit.device)), "scale": scale}


def unpack(columns: Mapping[str, Tensor], centroids: Tensor | None = None) -> Tensor:
    """Dequantize the result of ``pack`` to (B, N, D) float32, on the device of the columns."""
    if "codes" in columns:
        codes, scale = columns["codes"], columns["scale"]
        return decode(codes, _known(centroids).to(codes.device)) * scale.float()[..., None]
    if "scale" in columns:
        return dequantize_int8(columns["features"], columns["scale"])
    return columns["features"].to(torch.float32)


def rms_normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return RMS-normalized vectors (..., D) float32 and their root mean squares (...) float16.

    A vector of zeros stays as it is.
    """
    wide = vectors.detach().float()
    scale = wide.square().mean(-1).sqrt().clamp(max=_LARGEST).half()
    steps = scale.float()[..., None]
    return torch.where(steps > 0, wide / steps.clamp(min=1e-8), 0.0), scale


def from_bytes(
    rows: Tensor, shape: tuple[int, ...], compression: Compression, subvectors: int = 0
) -> dict[str, Tensor]:
    """Return the columns of ``pack`` from their bytes: features or codes, then scales.

    Rows are (R, bytes of a sample) uint8, ``shape`` is N and D, ``subvectors`` S, for "pq" only.
    """
    count, tokens = len(rows), shape[:-1]
    if compression == "float16":
        return {"features": rows.view(torch.float16).view(count, *shape)}
    wide = (*tokens, subvectors) if compression == "pq" else shape
    numbers = rows[:, : prod(wide)].contiguous().view(count, *wide)
    scale = rows[:, prod(wide) :].contiguous().view(torch.float16).view(count, *tokens)
    if compression == "pq":
        return {"codes": numbers, "scale": scale}
    return {"features": numbers.view(torch.int8), "scale": scale}


def _known(centroids: Tensor | None) -> Tensor:
    if centroids is None:
        raise ValueError(
            "compression is 'pq' and centroids is None: compute them with fit_centroids"
        )
    return centroids
