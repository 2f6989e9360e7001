"""Recall at k of image-text retrieval, exact and independent of the chunk size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcl.evaluation.strict_json import Amount, Count

# Cosines in float64 of unit vectors differ by less than this between two orders of summation.
TIE = 1e-12


KS = (1, 5, 10)
"""Numbers of results that the field counts."""


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

    @property
    def mean(self) -> float:
        """Mean recall at 1 of both directions: the one number of a cell of the matrix."""
        return (self.image_to_text[1] + self.text_to_image[1]) / 2


def recall_at_k(
    image: Tensor,
    text: Tensor,
    captions: Tensor,
    ks: Sequence[int] = KS,
    *,
    image_ids: Tensor | None = None,
    is_distinct: bool = False,
    chunk: int = 1024,
) -> Retrieval:
    """Compute recall at k of retrieval among N pairs of an image and a caption.

    Pairs are many-to-many. Every image is in the gallery once and is one query, as on COCO and
    Flickr30k (Karpathy and Fei-Fei 2015, arXiv:1412.2306): it is found if one of its captions is
    among the first k. Every pair's caption is in the gallery and is a query: it is found if its
    image is among the first k. Equal captions are one caption, so each of them hits every image
    that has it, and is a hit of it. A miss that ties with the best hit ranks before it, so a model
    that gives everything the same embedding scores 0 and not 1.

    Args:
        image: (N, D) embeddings, of any length; of an image in several pairs the first one counts.
        text: (N, D) embeddings, of any length.
        captions: (N,) integer id of each pair's caption.
        ks: number of results that count, each at least 1.
        image_ids: (N,) integer id of each pair's image, negative = an image of its own; None = all
            have their own.
        is_distinct: put every caption into the gallery once (its first pair), for data in which
            many images share a caption.
        chunk: queries compared at a time; bounds memory at chunk x N float64.

    Raises:
        ValueError: if the shapes differ, there are no pairs, a k is below 1 or an embedding is not
            finite.
    """
    _check(image, text, captions, image_ids, ks)
    caption = torch.unique(captions, return_inverse=True)[1]
    shown = _own_images(len(image), image_ids, image.device)
    kept = _first_indices(shown)
    gallery = _first_indices(caption) if is_distinct else torch.arange(len(text)).to(caption)
    images, texts = _normalize(image[kept]), _normalize(text)
    by_image = rank_of_first_hit(
        images, texts[gallery], shown[kept], caption[gallery], (shown, caption), chunk
    )
    by_text = rank_of_first_hit(texts, images, caption, shown[kept], (caption, shown), chunk)
    return Retrieval(
        image_to_text={k: _recall(by_image, k) for k in ks},
        text_to_image={k: _recall(by_text, k) for k in ks},
        texts=len(gallery),
        images=len(images),
    )


def rank_of_first_hit(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    pairs: tuple[Tensor, Tensor],
    chunk: int = 1024,
) -> Tensor:
    """Rank of each query's first hit: the number of misses that rank before it.

    Args:
        query: (Q, D) float64, unit length.
        gallery: (G, D) float64, unit length.
        query_ids: (Q,) small ids from 0.
        gallery_ids: (G,) small ids from 0.
        pairs: (N,) query ids and (N,) gallery ids that match; every query has a match.
        chunk: queries compared at a time.

    Returns:
        (Q,) int64; a query is a hit at k if its count is below k.
    """
    counts = []
    num_queries, num_gallery = (int(ids.max()) + 1 for ids in pairs)
    for queries, ids in zip(torch.split(query, chunk), torch.split(query_ids, chunk), strict=True):
        similarity = queries @ gallery.T
        own, row = torch.unique(ids, return_inverse=True)
        row_of = ids.new_full((num_queries,), -1)
        row_of[own] = torch.arange(len(own)).to(ids)
        is_own = row_of[pairs[0]] >= 0
        matches = torch.zeros(len(own), num_gallery, dtype=torch.bool, device=ids.device)
        matches[row_of[pairs[0][is_own]], pairs[1][is_own]] = True
        is_hit = matches[row][:, gallery_ids]
        best = similarity.masked_fill(~is_hit, -torch.inf).amax(1, keepdim=True)
        counts.append(((similarity > best - TIE) & ~is_hit).sum(1))
    return torch.cat(counts)


def _own_images(count: int, image_ids: Tensor | None, device: torch.device) -> Tensor:
    """Return (N,) small numbers of each pair's image, equal for the same image."""
    if image_ids is None:
        return torch.arange(count, device=device)
    known, number = torch.unique(image_ids, return_inverse=True)
    own = torch.arange(len(known), len(known) + count).to(number)
    numbers: Tensor = torch.unique(torch.where(image_ids < 0, own, number), return_inverse=True)[1]
    return numbers


@dataclass(frozen=True)
class RetrievalScores:
    """Recalls of one cell of the accuracy matrix, an entry of ``retrieval.json``.

    Args:
        after: name of the row, the task after which it was measured.
        task: name of the column.
        images: in the gallery.
        texts: captions in the gallery.
        image_to_text: "1", "5", "10" -> recall of captions for an image, 0 to 1.
        text_to_image: the same of images for a caption.
    """

    after: str
    task: str
    images: Count
    texts: Count
    image_to_text: Mapping[str, Amount]
    text_to_image: Mapping[str, Amount]

    def __post_init__(self) -> None:
        expected = {str(k) for k in KS}
        if not self.image_to_text.keys() == self.text_to_image.keys() == expected:
            raise ValueError(f"recalls of '{self.task}' are not those at {', '.join(expected)}")

    @classmethod
    def of(cls, found: Retrieval, after: str, task: str) -> RetrievalScores:
        """Return the scores of a cell."""
        recalls = (
            {str(k): way[k] for k in KS} for way in (found.image_to_text, found.text_to_image)
        )
        return cls(after, task, found.images, found.texts, *recalls)


def _recall(counts: Tensor, k: int) -> float:
    return int((counts < k).sum()) / len(counts)


def _normalize(embeddings: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    return torch.nn.functional.normalize(embeddings.detach().double(), dim=1, eps=tiny)


def _first_indices(ids: Tensor) -> Tensor:
    first: dict[int, int] = {}
    for index, each in enumerate(ids.tolist()):
        first.setdefault(each, index)
    return torch.tensor(list(first.values()), device=ids.device)


def _check(
    image: Tensor, text: Tensor, captions: Tensor, image_ids: Tensor | None, ks: Sequence[int]
) -> None:
    ids = captions if image_ids is None else image_ids
    is_paired = image.shape == text.shape and captions.shape == ids.shape == image.shape[:1]
    if image.ndim != 2 or not is_paired:
        shapes = f"image {tuple(image.shape)}, text {tuple(text.shape)}, captions {len(captions)}"
        more = "" if image_ids is None else f", image_ids {len(image_ids)}"
        raise ValueError(f"retrieval needs (N, D), (N, D) and (N,), got {shapes}{more}: pair them")
    if len(image) == 0:
        raise ValueError("retrieval needs at least one pair, got none: check the test shards")
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}: every k is at least 1")
    # NaN compares as False, which would count as a perfect rank.
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise ValueError("retrieval got embeddings that are not finite: the model has diverged")
