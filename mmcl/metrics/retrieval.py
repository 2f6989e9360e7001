"""Recall at k of picture-text retrieval, exact and independent of the chunk size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Cosines in float64 of unit vectors differ by less than this between two orders of summation.
TIE = 1e-12


@dataclass(frozen=True)
class Retrieval:
    """Recall at k in both directions.

    Args:
        image_to_text: k -> share of pictures with one of their captions among the first k.
        text_to_image: k -> share of captions with one of their pictures among the first k.
        texts: size of the gallery of captions.
        images: size of the gallery of pictures.
    """

    image_to_text: Mapping[int, float]
    text_to_image: Mapping[int, float]
    texts: int
    images: int


def recall_at_k(
    image: Tensor,
    text: Tensor,
    captions: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    is_distinct: bool = False,
    chunk: int = 1024,
) -> Retrieval:
    """Score retrieval among N pairs of a picture and a caption.

    Row n of ``image`` and row n of ``text`` belong together, and so do all rows of equal caption
    id: equal captions are all hits. A miss that ties with the best hit ranks before it, so a model
    that gives everything the same embedding scores 0 and not 1.

    Args:
        image: (N, D) embeddings, of any length.
        text: (N, D) embeddings, of any length.
        captions: (N,) integer id of each row's caption.
        ks: how many results count, each at least 1.
        is_distinct: put every caption into the gallery of captions once (its first row), for data
            in which many pictures share a caption.
        chunk: queries compared at a time; bounds memory at chunk x N float64.

    Raises:
        ValueError: if the shapes differ, there are no rows, a k is below 1 or an embedding is not
            finite.
    """
    _check(image, text, captions, ks)
    pictures, texts = _unit(image), _unit(text)
    gallery = _first_rows(captions) if is_distinct else slice(None)
    by_image = misses_ahead(pictures, texts[gallery], captions, captions[gallery], chunk)
    by_text = misses_ahead(texts, pictures, captions, captions, chunk)
    return Retrieval(
        image_to_text={k: _share(by_image, k) for k in ks},
        text_to_image={k: _share(by_text, k) for k in ks},
        texts=len(captions[gallery]),
        images=len(image),
    )


def misses_ahead(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int = 1024
) -> Tensor:
    """Count, for every query, the wrong results that rank before its best right one.

    Args:
        query: (Q, D) float64, unit length.
        gallery: (G, D) float64, unit length.
        query_ids: (Q,) ids.
        gallery_ids: (G,) ids; a result is right if its id is the query's. Every query id occurs.
        chunk: queries compared at a time.

    Returns:
        (Q,) int64; a query is a hit at k if its count is below k.
    """
    counts = []
    for rows, ids in zip(torch.split(query, chunk), torch.split(query_ids, chunk), strict=True):
        likeness = rows @ gallery.T
        is_hit = ids[:, None] == gallery_ids[None, :]
        best = likeness.masked_fill(~is_hit, -torch.inf).amax(1, keepdim=True)
        counts.append(((likeness > best - TIE) & ~is_hit).sum(1))
    return torch.cat(counts)


def _share(counts: Tensor, k: int) -> float:
    return int((counts < k).sum()) / len(counts)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.detach().double()
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit: Tensor = rows / length.clamp_min(torch.finfo(torch.float64).tiny)
    return unit


def _first_rows(captions: Tensor) -> Tensor:
    first: dict[int, int] = {}
    for row, caption in enumerate(captions.tolist()):
        first.setdefault(caption, row)
    return torch.tensor(list(first.values()), device=captions.device)


def _check(image: Tensor, text: Tensor, captions: Tensor, ks: Sequence[int]) -> None:
    shapes = f"image {tuple(image.shape)}, text {tuple(text.shape)}, captions {len(captions)}"
    if image.ndim != 2 or image.shape != text.shape or captions.shape != image.shape[:1]:
        raise ValueError(f"retrieval needs (N, D), (N, D) and (N,), got {shapes}: pair the rows")
    if len(image) == 0:
        raise ValueError("retrieval needs at least one pair, got none: check the test shards")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: every k is at least 1")
    # NaN compares as False, which would count as a perfect rank.
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise ValueError("retrieval got embeddings that are not finite: the model has diverged")
