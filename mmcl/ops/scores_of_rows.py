"""How hard or how unsure each row is, for choosing which to remember."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def losses_of_rows(
    logits: Tensor, targets: Tensor, rows: Tensor | None = None, count: int = 0
) -> Tensor:
    """Return the cross entropy of each row.

    Args:
        logits: (B, C) class scores, or (S, V) token scores.
        targets: (B,) or (S,) int64, what is right.
        rows: (S,) int64 the row of each scored token; None = one position a row.
        count: B, of rows with tokens.

    Returns:
        (B,) float64, of rows with tokens the mean over them.
    """
    logits = logits.detach().float()
    losses = functional.cross_entropy(logits, targets, reduction="none").double()
    return losses if rows is None else _means(losses, rows, count)


def entropies_of_rows(logits: Tensor, rows: Tensor | None = None, count: int = 0) -> Tensor:
    """Return the entropy of what a model thinks of each row, in nats.

    Args:
        logits: (B, C) class scores, minus infinity for classes that do not compete; or (S, V)
            token scores.
        rows: (S,) int64 the row of each scored token; None = one position a row.
        count: B, of rows with tokens.

    Returns:
        (B,) float64, of rows with tokens the mean over them.
    """
    known = functional.log_softmax(logits.detach().float(), dim=-1)
    parts = torch.where(torch.isfinite(known), -known.exp() * known, 0.0)
    entropies = parts.double().sum(-1)
    return entropies if rows is None else _means(entropies, rows, count)


def information_of_rows(tags: Tensor) -> Tensor:
    """Return how much the tags of each instruction tell: rare ones much, common ones little.

    InsInfo of InsCL, Wang et al. 2024, arXiv:2403.11435: the sum over an instruction's tags of
    log(N / f), N instructions of which f have the tag.

    Args:
        tags: (N, K) int64, the tags of every instruction, none twice in one; -1 = no tag.

    Returns:
        (N,) float64, 0 or more.
    """
    is_tag = tags >= 0
    if not bool(is_tag.any()):
        return torch.zeros(len(tags), dtype=torch.float64)
    _, place, counts = torch.unique(tags[is_tag], return_inverse=True, return_counts=True)
    worth = torch.zeros(tags.shape, dtype=torch.float64)
    worth[is_tag] = (len(tags) / counts.double()).log()[place]
    return worth.sum(1)


def _means(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return (count,) means, not a number for a row without values."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / torch.bincount(rows, minlength=count)
