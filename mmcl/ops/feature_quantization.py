"""Int8 quantization of vectors: one byte a number and a float16 scale for each vector."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from mmcl.ops.product_quantization import decode, encode

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

    Args:
        rows: (R, bytes of a sample) uint8.
        shape: N and D of the features.
        compression: as given to ``pack``.
        subvectors: S, for "pq" only.
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
