"""Recall at k of image-text retrieval, exact and independent of the chunk size."""

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
        image_to_text: k -> fraction of images with one of their captions among the first k.
        text_to_image: k -> fraction of captions with one of their images among the first k.
        texts: captions in the gallery.
        images: images in the gallery.
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
    """Compute recall at k of retrieval among N pairs of an image and a caption.

    ``image[n]`` and ``text[n]`` belong together, and so do all pairs of equal caption id: equal
    captions are all hits. A miss that ties with the best hit ranks before it, so a model that gives
    everything the same embedding scores 0 and not 1.

    Args:
        image: (N, D) embeddings, of any length.
        text: (N, D) embeddings, of any length.
        captions: (N,) integer id of each pair's caption.
        ks: number of results that count, each at least 1.
        is_distinct: put every caption into the gallery once (its first pair), for data in which
            many images share a caption.
        chunk: queries compared at a time; bounds memory at chunk x N float64.

    Raises:
        ValueError: if the shapes differ, there are no pairs, a k is below 1 or an embedding is not
            finite.
    """
    _check(image, text, captions, ks)
    images, texts = _normalize(image), _normalize(text)
    gallery = _first_indices(captions) if is_distinct else slice(None)
    by_image = rank_of_first_hit(images, texts[gallery], captions, captions[gallery], chunk)
    by_text = rank_of_first_hit(texts, images, captions, captions, chunk)
    return Retrieval(
        image_to_text={k: _recall(by_image, k) for k in ks},
        text_to_image={k: _recall(by_text, k) for k in ks},
        texts=len(captions[gallery]),
        images=len(image),
    )


def rank_of_first_hit(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int = 1024
) -> Tensor:
    """Rank of each query's first hit: the number of misses that rank before it.

    Args:
        query: (Q, D) float64, unit length.
        gallery: (G, D) float64, unit length.
        query_ids: (Q,) ids.
        gallery_ids: (G,) ids; a result is a hit if its id is the query's. Every query id occurs.
        chunk: queries compared at a time.

    Returns:
        (Q,) int64; a query is a hit at k if its count is below k.
    """
    counts = []
    for queries, ids in zip(torch.split(query, chunk), torch.split(query_ids, chunk), strict=True):
        similarity = queries @ gallery.T
        is_hit = ids[:, None] == gallery_ids[None, :]
        best = similarity.masked_fill(~is_hit, -torch.inf).amax(1, keepdim=True)
        counts.append(((similarity > best - TIE) & ~is_hit).sum(1))
    return torch.cat(counts)


def _recall(counts: Tensor, k: int) -> float:
    return int((counts < k).sum()) / len(counts)


def _normalize(embeddings: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    return torch.nn.functional.normalize(embeddings.detach().double(), dim=1, eps=tiny)


def _first_indices(captions: Tensor) -> Tensor:
    first: dict[int, int] = {}
    for index, caption in enumerate(captions.tolist()):
        first.setdefault(caption, index)
    return torch.tensor(list(first.values()), device=captions.device)


def _check(image: Tensor, text: Tensor, captions: Tensor, ks: Sequence[int]) -> None:
    shapes = f"image {tuple(image.shape)}, text {tuple(text.shape)}, captions {len(captions)}"
    if image.ndim != 2 or image.shape != text.shape or captions.shape != image.shape[:1]:
        raise ValueError(f"retrieval needs (N, D), (N, D) and (N,), got {shapes}: pair them")
    if len(image) == 0:
        raise ValueError("retrieval needs at least one pair, got none: check the test shards")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: every k is at least 1")
    # NaN compares as False, which would count as a perfect rank.
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise ValueError("retrieval got embeddings that are not finite: the model has diverged")
