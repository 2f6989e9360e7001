"""Orders in which samples are kept: lists of which any beginning is a good smaller memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Scores = Literal["high", "low", "spread"]


def ranked(scores: Tensor, keep: Scores) -> Tensor:
    """Order samples by a score, for example their loss.

    Args:
        scores: (R,) one number for each; equal ones stay in the order given.
        keep: "high" puts the largest first, "low" the smallest; "spread" takes some of every
            height, so that any beginning of the order is evenly spaced over the sorted scores to a
            factor of two. Rainbow Memory, Bang et al. 2021, arXiv:2103.17230, takes every
            (R / k)-th of the sorted list, which is the same where R and k are powers of two.

    Returns:
        (R,) int64 indices, the first to stay first.

    Raises:
        ValueError: if ``keep`` is none of the three or a score is not a number.
    """
    if keep not in ("high", "low", "spread"):
        raise ValueError(f"keep is '{keep}': choose 'high', 'low' or 'spread'")
    if bool(torch.isnan(scores).any()):
        raise ValueError(
            f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are not numbers: look for "
            "rows without a scored word, or for weights that are not numbers"
        )
    order = torch.argsort(scores, descending=keep == "high", stable=True)
    return order[spread_order(len(order))] if keep == "spread" else order


def spread_order(count: int) -> Tensor:
    """Return 0 to count - 1 so that any beginning is spread evenly: numbers by reversed bits.

    Van der Corput 1935: 0, 1/2, 1/4, 3/4, 1/8 ... of the next power of two.

    Args:
        count: numbers to order.
    """
    bits = max(0, count - 1).bit_length()
    numbers = torch.arange(1 << bits)
    turned = torch.zeros_like(numbers)
    for bit in range(bits):
        turned |= ((numbers >> bit) & 1) << (bits - 1 - bit)
    return turned[turned < count]


def in_groups(groups: Tensor, order_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Order every group by itself.

    Args:
        groups: (R,) int64, for example classes.
        order_of: called with the indices of a group's members; returns which of them are wanted,
            as places in what it was given, the first to stay first.

    Returns:
        (wanted,) int64 indices and (wanted,) int64 place of each in its group's order.
    """
    indices, places = [groups[:0]], [groups[:0]]
    for group in torch.unique(groups).tolist():
        members = torch.nonzero(groups == group).flatten()
        order = order_of(members)
        indices.append(members[order.to(members.device)])
        places.append(torch.arange(len(order)))
    return torch.cat(indices), torch.cat(places)


def by_information(information: Tensor, instructions: Tensor) -> Tensor:
    """Order samples so that instructions come as often as they are informative.

    First one sample of every instruction, the most informative first; then turns are dealt by
    Webster's rule, so that m samples hold an instruction about m times its part of the sum. InsCL,
    Wang et al. 2024, arXiv:2403.11435, draws so many of each, and one at least.

    Args:
        information: (R,) of each sample's instruction, above or equal 0.
        instructions: (R,) int64, which instruction each sample has.

    Returns:
        (R,) int64 indices; inside an instruction samples stay in the order given.
    """
    turn = torch.zeros(len(instructions), dtype=torch.float64)
    by_instruction = torch.argsort(instructions, stable=True)
    _, counts = torch.unique_consecutive(instructions[by_instruction], return_counts=True)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turn[by_instruction] = (torch.arange(len(instructions)) - starts).double()
    order = torch.argsort(information, descending=True, stable=True)
    wait = torch.where(turn > 0, (turn + 0.5) / information.double().clamp(min=1e-12), 0.0)
    return order[torch.argsort(wait[order], stable=True)]
