"""Several processes that must agree: rows in global order, sums, and gathers with gradients.

Rows of a global batch are dealt to ranks by stride: row i of rank r stands at place i * W + r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of a same-shaped tensor over all ranks; the tensor itself on one process."""
    if rank_and_world()[1] == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _counts(rows: int, device: torch.device) -> list[int]:
    _, world = rank_and_world()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


def _gather_padded(tensor: Tensor, counts: list[int]) -> list[Tensor]:
    longest = max(counts)
    flat = tensor.detach().contiguous()
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    padded = flat.new_zeros((longest, *flat.shape[1:]))
    padded[: flat.shape[0]] = flat
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count].to(tensor.dtype) for part, count in zip(parts, counts, strict=True)]


def global_order(counts: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the permutation that turns rank-by-rank rows into global batch order.

    Args:
        counts: rows held by each rank.
        device: where to make the result.

    Returns:
        (sum of counts,) int64: ``torch.cat(parts)[order]`` is the global batch.
    """
    world = len(counts)
    places = [torch.arange(count) * world + rank for rank, count in enumerate(counts)]
    return torch.argsort(torch.cat(places)).to(device)


def gather_rows(tensor: Tensor) -> Tensor:
    """Return the rows of all ranks in global batch order, without gradient.

    Args:
        tensor: (R, ...) this rank's rows; R may differ between ranks.

    Returns:
        (sum of R, ...), the same on every rank.
    """
    if rank_and_world()[1] == 1:
        return tensor.detach()
    counts = _counts(tensor.shape[0], tensor.device)
    return torch.cat(_gather_padded(tensor, counts))[global_order(counts, tensor.device)]


def gather_texts(texts: Sequence[str], device: torch.device | str = "cpu") -> list[str]:
    """Return the texts of all ranks, rank after rank, the same on every rank.

    Args:
        texts: this rank's, without line breaks in them.
        device: where the process group wants its tensors.
    """
    if rank_and_world()[1] == 1:
        return list(texts)
    said = torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8, device=device)
    sizes = gather_rows(torch.tensor([len(said)], device=device)).tolist()
    padded = torch.zeros(1, max(1, *sizes), dtype=torch.uint8, device=device)
    padded[0, : len(said)] = said
    rows = zip(gather_rows(padded).tolist(), sizes, strict=True)
    return [text for row, size in rows if size for text in bytes(row[:size]).decode().split("\n")]


class _GatherWithGradient(torch.autograd.Function):
    """All ranks' rows forward; backward sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        counts = _counts(tensor.shape[0], tensor.device)
        ctx.counts = counts
        return torch.cat(_gather_padded(tensor, counts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        rank, _ = rank_and_world()
        start = sum(ctx.counts[:rank])
        return total[start : start + ctx.counts[rank]]


def gather_with_gradient(tensor: Tensor) -> tuple[Tensor, int]:
    """Return all ranks' rows, rank after rank, with gradient, and where this rank's rows start.

    When every rank takes the mean loss of its own rows against all gathered rows, and the ranks'
    gradients are averaged with the weights of their row counts, the result is the gradient of the
    one global loss.

    Args:
        tensor: (R, ...) rows with a graph.

    Returns:
        (sum of R, ...) rows and the offset of this rank's first row.
    """
    rank, world = rank_and_world()
    if world == 1:
        return tensor, 0
    gathered: Tensor = _GatherWithGradient.apply(tensor)
    return gathered, sum(_counts(tensor.shape[0], tensor.device)[:rank])
