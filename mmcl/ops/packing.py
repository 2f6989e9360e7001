"""Feature rows in fewer bytes: float16, one byte a number, or one byte for many numbers.

A packed row is one or two columns, which can also stand side by side as plain bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

from mmcl.ops.product_quantisation import decode, encode
from mmcl.ops.rounding import from_int8, to_int8

Store = Literal["float16", "int8", "pq"]
STORES: tuple[str, ...] = get_args(Store)
PACKED = ("features", "codes", "scale")
"""Columns that a packed row may have."""
_LARGEST = torch.finfo(torch.float16).max


def pack(features: Tensor, store: Store, centroids: Tensor | None = None) -> dict[str, Tensor]:
    """Return the columns of a table that hold features.

    Args:
        features: (B, N, D) floats.
        store: "float16" = rounded; "int8" = one byte a number and a scale for each token; "pq" =
            product-quantised, the root mean square of each token apart, so that a token of zeros
            stays one and centroids need not know how long tokens are.
        centroids: (S, K, D / S), for "pq".

    Returns:
        ``features`` (B, N, D) float16 or int8, or ``codes`` (B, N, S) uint8; but for float16
        ``scale`` (B, N) float16.
    """
    if store == "float16":
        return {"features": features.detach().to(torch.float16)}
    if store == "int8":
        rounded, scale = to_int8(features)
        return {"features": rounded, "scale": scale}
    unit, scale = levelled(features)
    return {"codes": encode(unit, _known(centroids).to(unit.device)), "scale": scale}


def unpack(columns: Mapping[str, Tensor], centroids: Tensor | None = None) -> Tensor:
    """Return (B, N, D) float32 of what ``pack`` made, on the device of the columns."""
    if "codes" in columns:
        codes, scale = columns["codes"], columns["scale"]
        return decode(codes, _known(centroids).to(codes.device)) * scale.float()[..., None]
    if "scale" in columns:
        return from_int8(columns["features"], columns["scale"])
    return columns["features"].to(torch.float32)


def levelled(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors (..., D) float32 of root mean square 1, and theirs (...) float16.

    A vector of zeros stays as it is.
    """
    wide = vectors.detach().float()
    scale = wide.square().mean(-1).sqrt().clamp(max=_LARGEST).half()
    steps = scale.float()[..., None]
    return torch.where(steps > 0, wide / steps.clamp(min=1e-8), 0.0), scale


def from_bytes(
    rows: Tensor, shape: tuple[int, ...], store: Store, parts: int = 0
) -> dict[str, Tensor]:
    """Return the columns whose bytes stand side by side, features or codes before scales.

    Args:
        rows: (R, bytes of a row) uint8.
        shape: N and D of the features.
        store: as they were packed.
        parts: S, for "pq".
    """
    count, tokens = len(rows), shape[:-1]
    if store == "float16":
        return {"features": rows.view(torch.float16).view(count, *shape)}
    wide = (*tokens, parts) if store == "pq" else shape
    numbers = rows[:, : prod(wide)].contiguous().view(count, *wide)
    scale = rows[:, prod(wide) :].contiguous().view(torch.float16).view(count, *tokens)
    if store == "pq":
        return {"codes": numbers, "scale": scale}
    return {"features": numbers.view(torch.int8), "scale": scale}


def _known(centroids: Tensor | None) -> Tensor:
    if centroids is None:
        raise ValueError("there are no centroids and store is 'pq': learn them first")
    return centroids
