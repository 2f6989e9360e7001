"""Routing: similarity of samples to tasks and to the keys of a prompt pool, and gates of experts.

Every function but ``k_means`` treats samples one by one, so a prediction does not depend on the
other samples of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def cosine_similarity(
    features: Sequence[Tensor], means: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """Return the cosine similarity of samples and tasks, a weighted sum over embeddings.

    HiDe-LLaVA, Guo et al. 2025, arXiv:2503.12941, weighs images by 0.5 and questions by 0.5.

    Args:
        features: (B, E_k) for each embedding k; all zeros for a sample without an image.
        means: (T, E_k) task prototypes for each embedding; their lengths do not matter.
        weights: weight of each embedding.

    Returns:
        (B, T) float64; the cosine similarity of a zero vector is 0.

    Raises:
        ValueError: if the dims differ, or there is no embedding.
    """
    total: Tensor | None = None
    for seen, mean, weight in zip(features, means, weights, strict=True):
        if seen.shape[-1] != mean.shape[-1]:
            raise ValueError(
                f"samples have dim {seen.shape[-1]} and tasks {mean.shape[-1]}: both must come "
                "from the same embedding; keep the encoder that the tasks were trained with"
            )
        unit = functional.normalize(seen.double(), dim=-1)
        cosine = weight * (unit @ functional.normalize(mean.double(), dim=-1).T)
        total = cosine if total is None else total + cosine
    if total is None:
        raise ValueError("features is empty: give at least one embedding")
    return total


def soft_gates(scores: Tensor, is_known: Tensor, temperature: float) -> Tensor:
    """Return soft gates (B, T): a softmax of (B, T) scores over the known tasks, 0 for others.

    At least one task of ``is_known`` (T,) must be; a smaller ``temperature`` is sharper.
    """
    return scores.masked_fill(~is_known, -torch.inf).div(temperature).softmax(-1)


def one_hot_gates(choice: Tensor, adapters: int) -> Tensor:
    """Return one-hot gates (B, ``adapters``) float32: weight 1 for each sample's choice (B,)."""
    return functional.one_hot(choice, adapters).float()


def top_k_gates(weights: Tensor, top_k: int) -> Tensor:
    """Return top-k gates: the largest weights, scaled to sum to 1; the others are 0.

    Weights are (..., E), at least 0 and not all 0; the gradient goes to the kept ones.
    """
    best = weights.topk(top_k, dim=-1)
    kept = best.values / best.values.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, best.indices, kept)


def top_k_mask(weights: Tensor, top_k: int) -> Tensor:
    """Return the top-k mask (..., E) bool: True for the ``top_k`` largest of (..., E) weights."""
    chosen = weights.topk(top_k, dim=-1).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, chosen, True)


def top_k_ascending(scores: Tensor, top_k: int) -> Tensor:
    """Return the top-k tasks of each sample in ascending order of score, the best one last.

    ModalPrompt, Zeng et al. 2024, arXiv:2410.05849: the best prompt is next to the text. Of scores
    (B, T) the result is (B, min(top_k, T)) int64.
    """
    return scores.topk(min(top_k, scores.shape[1]), dim=1).indices.flip(1)


def ema_weights(before: Tensor, now: Tensor, momentum: float) -> Tensor:
    """Return the EMA weight of each expert's old parameters when a task ends.

    CL-MoE, Huai et al. 2025, arXiv:2503.00413, as in the authors' script: 1 - ``momentum`` for
    experts in the lead only ``before``, else ``momentum``; all of shape (..., E).
    """
    kept = torch.full(now.shape, momentum, dtype=torch.float64, device=now.device)
    return torch.where(before & ~now, 1 - kept, kept)


def group_max(scores: Tensor, owner: Tensor, groups: int) -> Tensor:
    """Return the maximum score of each group of columns, (B, G), -inf for a group without any.

    Scores are (B, C), and ``owner`` (C,) int64 is the group of each column.
    """
    best = scores.new_full((len(scores), groups), -torch.inf)
    index = owner.expand(len(scores), -1)
    return best.scatter_reduce(1, index, scores, "amax", include_self=True)


def k_means(vectors: Tensor, centers: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """Return k-means centers: Lloyd iterations from a k-means++ start.

    Arthur & Vassilvitskii 2007. Processes with the same vectors and seed get the same centers.

    Args:
        vectors: (R, D), at least one.
        centers: K, number of centers at most; fewer if there are fewer different vectors.
        generator: CPU generator of the start.
        rounds: iterations, at most; it stops when no assignment changes.

    Returns:
        (up to K, D) float64; a center that lost all its vectors stays where it was.
    """
    vectors = vectors.double()
    found = _k_means_plus_plus(vectors, centers, generator)
    last: Tensor | None = None
    for _ in range(rounds):
        nearest = torch.cdist(vectors, found).argmin(1)
        if last is not None and torch.equal(nearest, last):
            break
        last = nearest
        own = functional.one_hot(nearest, len(found)).to(vectors)
        counts = own.sum(0)[:, None]
        found = torch.where(counts > 0, own.T @ vectors / counts.clamp(min=1), found)
    return found


def _k_means_plus_plus(vectors: Tensor, centers: int, generator: torch.Generator) -> Tensor:
    """Return the k-means++ start: drawn in proportion to squared distance from those before."""
    first = int(torch.randint(len(vectors), (1,), generator=generator))
    chosen = [first]
    distance = (vectors - vectors[first]).square().sum(1)
    while len(chosen) < centers and bool(distance.any()):
        chosen.append(int(torch.multinomial(distance.cpu(), 1, generator=generator)))
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1))
    return vectors[chosen]


def match_keys(query: Tensor, keys: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Select the ``top_k`` prompt-pool keys of highest cosine similarity for each sample.

    L2P, Wang et al. 2022, arXiv:2112.08654; their N is ``top_k``, their M is K.

    Args:
        query: (B, D) embedding of each sample without prompts.
        keys: (K, D) one trainable key per pool entry.
        top_k: entries to select per sample, 1 to K.

    Returns:
        index (B, top_k) int64, best first, and similarity (B, top_k) in [-1, 1]; in float32 or
        wider, also under autocast, because half precision would rank other keys first.

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
    wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        unit_query = functional.normalize(query.to(wide), dim=-1)
        similarity = unit_query @ functional.normalize(keys.to(wide), dim=-1).T
    best = similarity.topk(top_k, dim=1)
    return best.indices, best.values


def gather_prompts(prompts: Tensor, index: Tensor) -> Tensor:
    """Gather the tokens of pool entries (K, P, D) that each sample selected, (B, top_k) int64.

    Returns:
        (B, top_k * P, D): the tokens of the first entry, then of the second, and so on.
    """
    return prompts[index].flatten(1, 2)


def key_pull_loss(similarity: Tensor) -> Tensor:
    """Return the key-pull loss: low if the selected keys are similar to their queries.

    Minus the mean over samples of the summed (B, top_k) cosine similarity, in [-top_k, top_k].
    """
    return -similarity.sum(dim=1).mean()


def count_choices(index: Tensor, pool_size: int) -> Tensor:
    """Count how often each of K = ``pool_size`` entries occurs in (B, top_k) int64: (K,) int64."""
    # bincount has no deterministic CUDA kernel; a comparison has.
    entries = torch.arange(pool_size, device=index.device)
    return (index[..., None] == entries).flatten(0, -2).sum(0)
