"""Collectives over all ranks: sums, gathers in global order, gathers with gradient.

A global batch is distributed over W ranks by stride: sample i of rank r has index i * W + r.
torch's own gathers know neither this order nor ranks with different numbers of samples.
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


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a same-shaped tensor over all ranks; the tensor itself on one process."""
    if rank_and_world()[1] == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _counts(count: int, device: torch.device) -> list[int]:
    _, world = rank_and_world()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([count], dtype=torch.int64, device=device))
    return [int(size) for size in counts]


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


def interleave_ranks(counts: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the permutation from rank-after-rank order to the order of the global batch.

    Args:
        counts: number of samples on each rank.
        device: device of the result.

    Returns:
        (sum of counts,) int64: ``torch.cat(parts)[order]`` is the global batch, where ``parts``
        holds each rank's samples.
    """
    world = len(counts)
    indices = [torch.arange(count) * world + rank for rank, count in enumerate(counts)]
    return torch.argsort(torch.cat(indices)).to(device)


def all_gather_samples(tensor: Tensor) -> Tensor:
    """Gather the samples of all ranks in global batch order, without gradient.

    Args:
        tensor: (R, ...) this rank's samples; R may differ between ranks.

    Returns:
        (sum of R, ...), the same on every rank.
    """
    if rank_and_world()[1] == 1:
        return tensor.detach()
    counts = _counts(tensor.shape[0], tensor.device)
    return torch.cat(_gather_padded(tensor, counts))[interleave_ranks(counts, tensor.device)]


def all_gather_strings(texts: Sequence[str], device: torch.device | str = "cpu") -> list[str]:
    """Gather the strings of all ranks, rank after rank; every rank gets the same list.

    Args:
        texts: this rank's strings, each without line breaks.
        device: device that the process group communicates on.
    """
    if rank_and_world()[1] == 1:
        return list(texts)
    own = torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8, device=device)
    sizes = all_gather_samples(torch.tensor([len(own)], device=device)).tolist()
    padded = torch.zeros(1, max(1, *sizes), dtype=torch.uint8, device=device)
    padded[0, : len(own)] = own
    parts = zip(all_gather_samples(padded).tolist(), sizes, strict=True)
    return [
        text for part, size in parts if size for text in bytes(part[:size]).decode().split("\n")
    ]


class _GatherWithGradient(torch.autograd.Function):
    """Gather with gradient: the backward pass sums all ranks' gradients of this rank's samples."""

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


def all_gather_with_grad(tensor: Tensor) -> tuple[Tensor, int]:
    """Gather the samples of all ranks, rank after rank, with gradient.

    If every rank takes the mean loss of its own samples against all gathered samples, and the
    ranks' gradients are averaged with weights in proportion to their numbers of samples, the
    result is the gradient of the one global loss.

    Args:
        tensor: (R, ...) this rank's samples, part of an autograd graph; R may differ between ranks.

    Returns:
        (sum of R, ...) samples of all ranks, and the offset of this rank's first sample.
    """
    rank, world = rank_and_world()
    if world == 1:
        return tensor, 0
    gathered: Tensor = _GatherWithGradient.apply(tensor)
    return gathered, sum(_counts(tensor.shape[0], tensor.device)[:rank])
