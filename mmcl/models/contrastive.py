"""Losses of contrastive models, over the rows of all processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import UNSCORED
from mmcl.core.distributed import gather_with_gradient
from mmcl.core.randomness import ranks_of


def caption_loss(
    image: Tensor, text: Tensor, tokens: Tensor, scale: Tensor, scored: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of pairs (Radford et al. 2021, arXiv:2103.00020), mean over scored rows.

    Negatives come from the rows of all ranks. Rows with the same text are positives of each other:
    they share the target evenly, otherwise a batch with repeated captions punishes right answers.

    Args:
        image: (B, D) unit image embeddings.
        text: (B, D) unit text embeddings.
        tokens: (B, L) int64 the texts, padded with 0; equal rows are equal texts.
        scale: () factor of the cosine.
        scored: (B,) bool, the rows that take part, also as negatives; None = all.

    Returns:
        Scalar, 0 without scored rows. Averaged over ranks with their counts of scored rows as
        weights it is the global loss.
    """
    if scored is not None:
        image, text, tokens = image[scored], text[scored], tokens[scored]
    all_image, start = gather_with_gradient(image)
    all_text, _ = gather_with_gradient(text)
    names = _text_numbers(tokens)
    everyone, _ = gather_with_gradient(names)
    same = (names[:, None] == everyone[None]).all(-1).to(image.dtype)
    target = same / same.sum(1, keepdim=True)
    by_image = functional.cross_entropy(scale * image @ all_text.T, target, reduction="sum")
    by_text = functional.cross_entropy(scale * text @ all_image.T, target, reduction="sum")
    return (by_image + by_text) / (2 * max(1, len(image)))


def _text_numbers(tokens: Tensor) -> Tensor:
    # Ranks cut texts to different lengths, so a text is named by a hash that padding leaves alone.
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) << 32
    return (ranks_of(0, 0, tokens + place) * (tokens != 0)).sum(1, keepdim=True)


def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy over class scores, mean over scored rows, 0 if no row is scored.

    Args:
        logits: (B, C) class scores; -inf leaves a class out of the softmax.
        labels: (B,) int64 columns, -100 = not scored.
        smoothing: share of the target spread over all classes, 0 to 1.
    """
    total = functional.cross_entropy(
        logits, labels, ignore_index=UNSCORED, label_smoothing=smoothing, reduction="sum"
    )
    return total / (labels != UNSCORED).sum().clamp(min=1)
