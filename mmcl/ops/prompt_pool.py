"""Prompt pools: keys that are matched with a query, and the prompts behind them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def match_keys(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Find, for every row, the pool entries whose keys point its way.

    Likeness is the cosine between query and key, so lengths do not matter.
    L2P, Wang et al. 2022, arXiv:2112.08654; their N is ``top_k``, their M is K.

    Args:
        query: (B, D) unprompted embedding of each row.
        keys: (K, D) one learned key per pool entry.
        top_k: entries to choose per row, 1 to K.

    Returns:
        index (B, top_k) int64, best first, and likeness (B, top_k) in [-1, 1].

    Raises:
        ValueError: if the widths differ or ``top_k`` exceeds the pool.
    """
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query is {query.shape[-1]} wide but keys are {keys.shape[-1]}: build the pool with "
            f"the width of model.embed(batch, 'image')"
        )
    if not 1 <= top_k <= keys.shape[0]:
        raise ValueError(
            f"top_k must be 1 to {keys.shape[0]} (the pool size), got {top_k}: choose fewer "
            "entries per row or make the pool larger"
        )
    likeness = functional.normalize(query, dim=-1) @ functional.normalize(keys, dim=-1).T
    best = likeness.topk(top_k, dim=1)
    return best.indices, best.values


def gather_prompts(prompts: Tensor, index: Tensor) -> Tensor:
    """Line up the chosen prompts of every row, each row its own.

    Args:
        prompts: (K, P, D) tokens of each pool entry.
        index: (B, top_k) int64 chosen entries, 0 to K-1.

    Returns:
        (B, top_k * P, D): the tokens of the first choice, then of the second, and so on.
    """
    return prompts[index].flatten(1, 2)


def pull(likeness: Tensor) -> Tensor:
    """Return how far the chosen keys are from their queries, to be made small.

    Args:
        likeness: (B, top_k) cosines of the chosen keys.

    Returns:
        Scalar in [-top_k, top_k]: minus the mean over rows of the summed likeness.
    """
    return -likeness.sum(dim=1).mean()


def count_choices(index: Tensor, pool: int) -> Tensor:
    """Count how often each pool entry was chosen.

    Args:
        index: (B, top_k) int64 chosen entries, 0 to ``pool`` - 1.
        pool: number of entries, K.

    Returns:
        (K,) int64.
    """
    # bincount has no deterministic CUDA kernel; a comparison has.
    entries = torch.arange(pool, device=index.device)
    return (index[..., None] == entries).flatten(0, -2).sum(0)
