"""Routing: which task a row looks like, and how much each expert weighs for it.

Nothing here looks at more than one row at a time, so an answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def likeness(
    features: Sequence[Tensor], means: Sequence[Tensor], shares: Sequence[float]
) -> Tensor:
    """Compare rows with tasks in several embeddings at once.

    HiDe-LLaVA, Guo et al. 2025, arXiv:2503.12941, takes 0.5 of pictures and 0.5 of questions.

    Args:
        features: (B, E_k) for each embedding k; a row without a picture may be all zeros.
        means: (T, E_k) for each embedding, of any length: only directions count.
        shares: weight of each embedding.

    Returns:
        (B, T) float64, the weighted sum of cosines; a zero vector has cosine 0 with everything.

    Raises:
        ValueError: if widths differ.
    """
    total: Tensor | None = None
    for seen, mean, share in zip(features, means, shares, strict=True):
        if seen.shape[-1] != mean.shape[-1]:
            raise ValueError(
                f"rows are {seen.shape[-1]} wide and tasks {mean.shape[-1]}: both must come from "
                "the same embedding; keep the guide that the tasks were learned with"
            )
        unit = functional.normalize(seen.double(), dim=-1)
        cosine = share * (unit @ functional.normalize(mean.double(), dim=-1).T)
        total = cosine if total is None else total + cosine
    if total is None:
        raise ValueError("features is empty: compare in at least one embedding")
    return total


def soft_gates(scores: Tensor, is_known: Tensor, temperature: float) -> Tensor:
    """Weigh tasks by a softmax over those that are known.

    Args:
        scores: (B, T).
        is_known: (T,) bool; at least one.
        temperature: above 0; smaller is sharper.

    Returns:
        (B, T), each row a distribution, 0 for unknown tasks.
    """
    return scores.masked_fill(~is_known, -torch.inf).div(temperature).softmax(-1)


def one_hot_gates(choice: Tensor, slots: int) -> Tensor:
    """Let one slot weigh 1 for each row.

    Args:
        choice: (B,) int64, 0 to ``slots`` - 1.
        slots: S.

    Returns:
        (B, S) float32.
    """
    return functional.one_hot(choice, slots).float()


def top_k_gates(weights: Tensor, top_k: int) -> Tensor:
    """Keep the largest weights and let them sum to 1 again.

    Args:
        weights: (..., E), at least 0 and not all 0.
        top_k: weights to keep, 1 to E.

    Returns:
        (..., E), with gradient to the kept ones.
    """
    best = weights.topk(top_k, dim=-1)
    kept = best.values / best.values.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, best.indices, kept)


def top_k_mask(weights: Tensor, top_k: int) -> Tensor:
    """Return (..., E) bool, True on the ``top_k`` largest of (..., E) weights."""
    chosen = weights.topk(top_k, dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, chosen, True)


def nearest_last(scores: Tensor, top_k: int) -> Tensor:
    """Choose the ``top_k`` best columns of each row, the best one last.

    ModalPrompt, Zeng et al. 2024, arXiv:2410.05849: the best prompt stands next to the text.

    Args:
        scores: (B, T).
        top_k: columns to choose; all of them where there are fewer.

    Returns:
        (B, min(top_k, T)) int64.
    """
    return scores.topk(min(top_k, scores.shape[1]), dim=1).indices.flip(1)


def momentum_shares(before: Tensor, now: Tensor, momentum: float) -> Tensor:
    """Say how much of its old weights each expert keeps when a task ends.

    CL-MoE, Huai et al. 2025, arXiv:2503.00413, as the authors' script has it.

    Args:
        before: (..., E) bool, experts that led in the task before.
        now: (..., E) bool, experts that led in this task.
        momentum: 0 to 1.

    Returns:
        (..., E) float64: 1 - ``momentum`` for experts that led only before, else ``momentum``.
    """
    kept = torch.full(now.shape, momentum, dtype=torch.float64, device=now.device)
    return torch.where(before & ~now, 1 - kept, kept)


def best_of_groups(scores: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Return the best score of each group's columns.

    Args:
        scores: (B, C).
        owner: (C,) int64, the group of each column.
        groups: G.

    Returns:
        (B, G), -inf for a group without columns.
    """
    best = scores.new_full((len(scores), groups), -torch.inf)
    index = owner.expand(len(scores), -1)
    return best.scatter_reduce(1, index, scores, "amax", include_self=True)


def k_means(rows: Tensor, centres: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """Find centres of rows by Lloyd's rounds from a k-means++ start.

    Arthur & Vassilvitskii 2007. Every process that gives the same rows gets the same centres.

    Args:
        rows: (R, D), at least one.
        centres: K at most; no more than there are different rows.
        generator: a CPU generator, of the start.
        rounds: at most; it ends sooner when no row changes its centre.

    Returns:
        (up to K, D) float64; a centre that lost all its rows stays where it was.
    """
    rows = rows.double()
    found = _spread_start(rows, centres, generator)
    last: Tensor | None = None
    for _ in range(rounds):
        nearest = torch.cdist(rows, found).argmin(1)
        if last is not None and torch.equal(nearest, last):
            break
        last = nearest
        own = functional.one_hot(nearest, len(found)).to(rows)
        counts = own.sum(0)[:, None]
        found = torch.where(counts > 0, own.T @ rows / counts.clamp(min=1), found)
    return found


def _spread_start(rows: Tensor, centres: int, generator: torch.Generator) -> Tensor:
    """K rows, each drawn in proportion to its squared distance from those before it."""
    first = int(torch.randint(len(rows), (1,), generator=generator))
    chosen = [first]
    distance = (rows - rows[first]).square().sum(1)
    while len(chosen) < centres and bool(distance.any()):
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]
