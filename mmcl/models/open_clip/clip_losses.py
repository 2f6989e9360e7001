"""Losses of contrastive dual encoders: of pairs of images and captions, and of class scores.

A file of its own, since these are functions of tensors alone. Pairs are many-to-many: an image has
several captions, and a caption may describe several images.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import IGNORE_INDEX
from mmcl.core.distributed import all_gather_with_grad
from mmcl.models.open_clip.towers import similarity


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    text_ids: Tensor,
    image_ids: Tensor | None = None,
    in_loss: Tensor | None = None,
) -> Tensor:
    """Symmetric InfoNCE of pairs (Radford et al. 2021, arXiv:2103.00020), mean over samples.

    Negatives come from all ranks. Samples of the same image or of the same text are positives of
    each other and share the target evenly, as those of one image id in the retrieval training of
    ALBEF (Li et al. 2021, arXiv:2107.07651) and BLIP; otherwise a batch would punish correct
    matches. Where all images and texts differ, it is the loss of CLIP to the bit.

    Args:
        image: (B, D) unit image embeddings.
        text: (B, D) unit text embeddings.
        scale: () logit scale.
        text_ids: (B,) int64, equal for equal texts, see ``mmcl.core.batch.text_ids``.
        image_ids: (B,) int64, see ``Batch.image_ids``; None = all images differ.
        in_loss: (B,) bool, the samples that take part, also as negatives; None = all.

    Returns:
        Scalar, 0 if no sample takes part. The mean over ranks, weighted by their numbers of such
        samples, is the global loss.
    """
    ids = _stacked_ids(text_ids, image_ids)
    if in_loss is not None:
        image, text, ids = image[in_loss], text[in_loss], ids[in_loss]
    all_image, _ = all_gather_with_grad(image)
    all_text, _ = all_gather_with_grad(text)
    positive = _positives(ids).to(image.dtype)
    target = positive / positive.sum(1, keepdim=True)
    scores = similarity(scale, image, all_text), similarity(scale, text, all_image)
    by_image = functional.cross_entropy(scores[0], target, reduction="sum")
    by_text = functional.cross_entropy(scores[1], target, reduction="sum")
    return (by_image + by_text) / (2 * max(1, len(image)))


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    text_ids: Tensor,
    image_ids: Tensor | None = None,
    in_loss: Tensor | None = None,
) -> Tensor:
    """Sigmoid loss of pairs (SigLIP, Zhai et al. 2023, arXiv:2303.15343), mean over samples.

    Every image is compared with every text of all ranks, each pair a binary decision: +1 for
    samples of the same image or of the same text, -1 for the others. The sum is divided by the
    number of samples, not of pairs, as in open_clip's ``SigLipLoss``.

    Args:
        image: (B, D) unit image embeddings.
        text: (B, D) unit text embeddings.
        scale: () logit scale.
        bias: () logit bias.
        text_ids: (B,) int64, equal for equal texts, see ``mmcl.core.batch.text_ids``.
        image_ids: (B,) int64, see ``Batch.image_ids``; None = all images differ.
        in_loss: (B,) bool, the samples that take part, also as negatives; None = all.

    Returns:
        Scalar, 0 if no sample takes part. The mean over ranks, weighted by their numbers of such
        samples, is the global loss.
    """
    ids = _stacked_ids(text_ids, image_ids)
    if in_loss is not None:
        image, text, ids = image[in_loss], text[in_loss], ids[in_loss]
    all_text, _ = all_gather_with_grad(text)
    scores = similarity(scale, image, all_text) + bias
    sign = 2 * _positives(ids).to(scores.dtype) - 1
    return -functional.logsigmoid(sign * scores).sum() / max(1, len(image))


def _stacked_ids(text_ids: Tensor, image_ids: Tensor | None) -> Tensor:
    """Return (B, 2) ids of texts and images; every rank gathers both, also without image ids."""
    own = torch.full_like(text_ids, -1) if image_ids is None else image_ids
    return torch.stack([text_ids, own], dim=1)


def _positives(ids: Tensor) -> Tensor:
    """Return (B, N) bool: which of the samples of all ranks match each sample of this one."""
    every, _ = all_gather_with_grad(ids)
    is_same = ids[:, None] == every[None]
    return is_same[..., 0] | (is_same[..., 1] & (ids[:, None, 1] >= 0))


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
