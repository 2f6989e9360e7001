"""Scores of samples (loss, entropy, tag information) for selecting which to store."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def sample_losses(
    logits: Tensor, targets: Tensor, sample_index: Tensor | None = None, count: int = 0
) -> Tensor:
    """Return the cross-entropy loss of each sample.

    Args:
        logits: (B, C) class scores, or (S, V) token scores.
        targets: (B,) int64 target classes, or (S,) int64 target tokens.
        sample_index: (S,) int64 index of each token's sample; None for class scores.
        count: B, number of samples; only read with ``sample_index``.

    Returns:
        (B,) float64; with ``sample_index``, each sample's mean over tokens, nan without tokens.
    """
    logits = logits.detach().float()
    losses = functional.cross_entropy(logits, targets, reduction="none").double()
    return losses if sample_index is None else _means(losses, sample_index, count)


def sample_entropies(logits: Tensor, sample_index: Tensor | None = None, count: int = 0) -> Tensor:
    """Return the entropy of the predicted distribution of each sample, in nats.

    Args:
        logits: (B, C) class scores, -inf for masked classes; or (S, V) token scores.
        sample_index: (S,) int64 index of each token's sample; None for class scores.
        count: B, number of samples; only read with ``sample_index``.

    Returns:
        (B,) float64; with ``sample_index``, each sample's mean over tokens, nan without tokens.
    """
    known = functional.log_softmax(logits.detach().float(), dim=-1)
    parts = torch.where(torch.isfinite(known), -known.exp() * known, 0.0)
    entropies = parts.double().sum(-1)
    return entropies if sample_index is None else _means(entropies, sample_index, count)


def tag_information(tags: Tensor) -> Tensor:
    """Return the tag information of each instruction: high for rare tags, low for common ones.

    InsInfo of InsCL, Wang et al. 2024, arXiv:2403.11435: the sum over an instruction's tags of
    log(N / f), where f of N instructions have the tag.

    Args:
        tags: (N, K) int64 tags of each instruction, without repeats; -1 = no tag.

    Returns:
        (N,) float64, 0 or more.
    """
    is_tag = tags >= 0
    if not bool(is_tag.any()):
        return torch.zeros(len(tags), dtype=torch.float64)
    _, index, counts = torch.unique(tags[is_tag], return_inverse=True, return_counts=True)
    information = torch.zeros(tags.shape, dtype=torch.float64)
    information[is_tag] = (len(tags) / counts.double()).log()[index]
    return information.sum(1)


def _means(values: Tensor, sample_index: Tensor, count: int) -> Tensor:
    """Return the mean of each sample's values, (count,); nan for a sample without values."""
    sums = values.new_zeros(count).index_add(0, sample_index, values)
    return sums / torch.bincount(sample_index, minlength=count)
