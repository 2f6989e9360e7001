"""Losses of contrastive dual encoders: of pairs of images and captions, and of class scores.

A file of its own, since these are functions of tensors alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import IGNORE_INDEX
from mmcl.core.distributed import all_gather_with_grad
from mmcl.core.seeding import hash_priorities
from mmcl.models.open_clip.towers import similarity


def clip_loss(
    image: Tensor, text: Tensor, tokens: Tensor, scale: Tensor, in_loss: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE of pairs (Radford et al. 2021, arXiv:2103.00020), mean over samples.

    Negatives come from all ranks. Samples with the same text are positives of each other and share
    the target evenly; otherwise a batch with repeated captions would punish correct matches.

    Args:
        image: (B, D) unit image embeddings.
        text: (B, D) unit text embeddings.
        tokens: (B, L) int64 texts, padded with 0; equal tokens are equal texts.
        scale: () logit scale.
        in_loss: (B,) bool, the samples that take part, also as negatives; None = all.

    Returns:
        Scalar, 0 if no sample takes part. The mean over ranks, weighted by their numbers of such
        samples, is the global loss.
    """
    if in_loss is not None:
        image, text, tokens = image[in_loss], text[in_loss], tokens[in_loss]
    all_image, _ = all_gather_with_grad(image)
    all_text, _ = all_gather_with_grad(text)
    hashes = _text_hashes(tokens)
    all_hashes, _ = all_gather_with_grad(hashes)
    same = (hashes[:, None] == all_hashes[None]).all(-1).to(image.dtype)
    target = same / same.sum(1, keepdim=True)
    scores = similarity(scale, image, all_text), similarity(scale, text, all_image)
    by_image = functional.cross_entropy(scores[0], target, reduction="sum")
    by_text = functional.cross_entropy(scores[1], target, reduction="sum")
    return (by_image + by_text) / (2 * max(1, len(image)))


def _text_hashes(tokens: Tensor) -> Tensor:
    # Ranks trim texts to different lengths, so the hash must not depend on padding.
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device) << 32
    return (hash_priorities(0, 0, tokens + position) * (tokens != 0)).sum(1, keepdim=True)


def class_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy over class scores, mean over samples in the loss, 0 if there are none.

    Args:
        logits: (B, C) class scores; -inf leaves a class out of the softmax.
        labels: (B,) int64 class indices, -100 = not in the loss.
        smoothing: fraction of the target that is spread over all classes, 0 to 1.
    """
    try:
        total = functional.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=smoothing, reduction="sum"
        )
    except IndexError as error:
        raise ValueError(
            f"labels go from {int(labels.min())} to {int(labels.max())} and the model has "
            f"{logits.shape[1]} classes: call model.set_classes with the names of all classes so "
            "far, and number labels in that order"
        ) from error
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
