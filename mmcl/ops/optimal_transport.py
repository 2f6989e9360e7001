"""Exact optimal transport between two small weighted sets of points."""

from __future__ import annotations

import torch
from torch import Tensor


def wasserstein_cost(cost: Tensor, supply: Tensor, demand: Tensor) -> float:
    """Return the optimal-transport cost: the least mean cost of moving one set onto another.

    If ``cost`` is a distance, this is the Wasserstein distance of order 1. Successive shortest
    paths with integer flows (Edmonds and Karp 1972): the plan is exact, and the same on every
    machine. For up to a few hundred points: the time grows with the third power.

    Args:
        cost: (N, M) cost of moving each point of the first set to each of the second.
        supply: (N,) int64 number of occurrences of each point of the first set, 1 or more.
        demand: (M,) int64 the same of the second set; the sums may differ.

    Raises:
        ValueError: if a set is empty, a count is below 1, or a cost is not finite.
    """
    counted = min(cost.shape) > 0 and int(supply.min()) > 0 and int(demand.min()) > 0
    if not counted or not bool(torch.isfinite(cost).all()):
        raise ValueError(
            f"cost has shape {tuple(cost.shape)}: give two sets of one point or more, each "
            "occurring once or more, and finite costs"
        )
    cost = cost.detach().cpu().double()
    left, wanted = supply.cpu() * int(demand.sum()), demand.cpu() * int(supply.sum())
    total = int(left.sum())
    flow = torch.zeros(cost.shape, dtype=torch.int64)
    own, other = torch.zeros(cost.shape[0], dtype=torch.float64), cost.min(0).values
    for row in range(len(left)):
        while int(left[row]) > 0:
            path = _shortest_path(cost - own[:, None] - other, flow, wanted, row, own, other)
            _send(path, flow, left, wanted)
    return float((flow * cost).sum() / total)


def _shortest_path(
    reduced: Tensor, flow: Tensor, wanted: Tensor, start: int, own: Tensor, other: Tensor
) -> list[tuple[int, int]]:
    """Return the shortest path, as (row, column) steps, from a row to a column with open demand.

    The potentials ``own`` and ``other`` are updated so that all reduced costs stay at least 0.
    """
    near, from_row = reduced[start].clone(), torch.full_like(wanted, start)
    is_open = torch.ones(len(wanted), dtype=torch.bool)
    row_near = torch.full((len(reduced),), torch.inf, dtype=torch.float64)
    row_near[start] = 0.0
    to_row = torch.full((len(reduced),), -1, dtype=torch.int64)
    while True:
        column = int(torch.where(is_open, near, torch.inf).argmin())
        if int(wanted[column]) > 0:
            break
        is_open[column] = False
        rows = torch.nonzero((flow[:, column] > 0) & torch.isinf(row_near)).flatten()
        if not len(rows):
            continue
        row_near[rows], to_row[rows] = near[column], column
        best = (near[column] + reduced[rows]).min(0)
        is_nearer = is_open & (best.values < near)
        near = torch.where(is_nearer, best.values, near)
        from_row = torch.where(is_nearer, rows[best.indices], from_row)
    is_met = torch.isfinite(row_near)
    own[is_met] += near[column] - row_near[is_met]
    other[~is_open] -= near[column] - near[~is_open]
    steps = [(int(from_row[column]), column)]
    while steps[-1][0] != start:
        column = int(to_row[steps[-1][0]])
        steps.append((int(from_row[column]), column))
    return steps


def _send(steps: list[tuple[int, int]], flow: Tensor, left: Tensor, wanted: Tensor) -> None:
    """Send the largest possible flow along a path: forward on its steps, back between them."""
    (_, end), (start, _) = steps[0], steps[-1]
    backward = [(row, column) for (row, _), (_, column) in zip(steps, steps[1:], strict=False)]
    amount = min(int(left[start]), int(wanted[end]), *(int(flow[step]) for step in backward))
    for step in steps:
        flow[step] += amount
    for step in backward:
        flow[step] -= amount
    left[start] -= amount
    wanted[end] -= amount
