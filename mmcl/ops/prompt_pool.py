"""Prompt pool (L2P): matching of keys with a query, and selection of the prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def match_keys(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the ``top_k`` prompt-pool keys of highest cosine similarity for each sample.

    L2P, Wang et al. 2022, arXiv:2112.08654; their N is ``top_k``, their M is K.

    Args:
        query: (B, D) embedding of each sample without prompts.
        keys: (K, D) one trainable key per pool entry.
        top_k: entries to select per sample, 1 to K.

    Returns:
        index (B, top_k) int64, best first, and similarity (B, top_k) in [-1, 1].

    Raises:
        ValueError: if the dims differ or ``top_k`` exceeds the pool.
    """
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query has dim {query.shape[-1]} but keys have {keys.shape[-1]}: build the pool with "
            f"the dim of model.embed(batch, 'image')"
        )
    if not 1 <= top_k <= keys.shape[0]:
        raise ValueError(
            f"top_k must be 1 to {keys.shape[0]} (the pool size), got {top_k}: choose fewer "
            "entries per sample or make the pool larger"
        )
    similarity = functional.normalize(query, dim=-1) @ functional.normalize(keys, dim=-1).T
    best = similarity.topk(top_k, dim=1)
    return best.indices, best.values


def gather_prompts(prompts: Tensor, index: Tensor) -> Tensor:
    """Gather the prompt tokens of the selected pool entries for each sample.

    Args:
        prompts: (K, P, D) tokens of each pool entry.
        index: (B, top_k) int64 selected entries, 0 to K-1.

    Returns:
        (B, top_k * P, D): the tokens of the first entry, then of the second, and so on.
    """
    return prompts[index].flatten(1, 2)


def key_pull_loss(similarity: Tensor) -> Tensor:
    """Return the key-pull loss: low if the selected keys are similar to their queries.

    Args:
        similarity: (B, top_k) cosine similarity of the selected keys.

    Returns:
        Scalar in [-top_k, top_k]: minus the mean over samples of the summed similarity.
    """
    return -similarity.sum(dim=1).mean()


def count_choices(index: Tensor, pool_size: int) -> Tensor:
    """Count how often each pool entry was selected.

    Args:
        index: (B, top_k) int64 selected entries, 0 to ``pool_size`` - 1.
        pool_size: K, number of entries.

    Returns:
        (K,) int64.
    """
    # bincount has no deterministic CUDA kernel; a comparison has.
    entries = torch.arange(pool_size, device=index.device)
    return (index[..., None] == entries).flatten(0, -2).sum(0)
