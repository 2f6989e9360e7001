"""Closed-form classifiers on fixed features: class prototypes and ridge regression.

All statistics are sums over samples, so tasks, shards and processes can be added in any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def class_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum the unit-length features of every class, the class prototypes.

    SimpleCIL, Zhou et al. 2023, arXiv:2303.07338.

    Args:
        features: (B, D); each vector is scaled to length 1 first.
        labels: (B,) int64, 0 to ``classes`` - 1; samples with a negative label are left out.
        classes: C.

    Returns:
        sums (C, D) float64 and counts (C,) int64.
    """
    own = one_hot(labels, classes)
    return own.T @ functional.normalize(features.double(), dim=1), own.sum(0).to(torch.int64)


def cosine_scores(features: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Return the cosine similarity of features (B, D) and class prototypes of ``class_sums``.

    Returns:
        (B, C) float64 cosines in [-1, 1], -inf for a class without samples.
    """
    unit = functional.normalize(features.double(), dim=1)
    cosines = unit @ functional.normalize(sums, dim=1).T
    return cosines.masked_fill(counts == 0, -torch.inf)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return one-hot labels (B, C) float64; all zeros for a negative label.

    Raises:
        ValueError: if a label is outside the classes.
    """
    if labels.numel() and int(labels.max()) >= classes:
        raise ValueError(
            f"label {int(labels.max())} is outside the {classes} classes seen so far: "
            "check task.class_ids, or the labels of the shard"
        )
    return (labels[:, None] == torch.arange(classes, device=labels.device)).double()


def random_projection(features: Tensor, projection: Tensor) -> Tensor:
    """Return the random projection (D, M) of features (B, D) of length 1, followed by ReLU.

    RanPAC, McDonnell et al. 2023, arXiv:2307.02251; their L is D, their M is M.
    """
    return functional.relu(functional.normalize(features.double(), dim=1) @ projection)


def solve_ridge(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Solve ridge regression from sums over samples, by Cholesky factorization.

    Args:
        gram: (M, M) float64, sum of h h^T.
        cross: (M, C) float64, sum of h y^T.
        ridge: number above 0 that is added to the diagonal.

    Returns:
        (M, C) float64 weights, or None if the regularized sum is numerically singular.
    """
    regular = gram + ridge * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(regular)
    return None if int(failed) else torch.cholesky_solve(cross, factor)


def squared_error(weights: Tensor, gram: Tensor, cross: Tensor, targets: float) -> float:
    """Return the summed squared error of ridge weights (M, C), from sums as in ``solve_ridge``.

    sum ||h W - y||^2 = tr(W^T G W) - 2 tr(W^T Q) + sum ||y||^2, the last of which is ``targets``;
    for one-hot targets the number of samples.
    """
    fit = (weights * (gram @ weights - 2 * cross)).sum()
    return float(fit) + targets


def choose_ridge(
    gram: tuple[Tensor, Tensor],
    cross: tuple[Tensor, Tensor],
    held: int,
    ridges: Sequence[float],
    slack: float = 1e-3,
) -> float:
    """Choose the ridge with the lowest error on held-out samples.

    Of all ridges whose error is within ``slack`` of the lowest, the largest is chosen: where the
    error is flat, rounding would decide, and with it the number of processes.

    Args:
        gram: (M, M) sums over the fitted samples, and over the held-out ones.
        cross: (M, C) sums over the fitted samples, and over the held-out ones.
        held: number of held-out samples; if 0, the middle of ``ridges`` is chosen.
        ridges: candidates, above 0.
        slack: relative tolerance, of the lowest error plus a thousandth of ``held``.

    Returns:
        One of ``ridges``.

    Raises:
        ValueError: if the sums are singular for every candidate.
    """
    order = sorted(ridges)
    if held == 0:
        return order[len(order) // 2]
    errors: dict[float, float] = {}
    for ridge in order:
        weights = solve_ridge(gram[0], cross[0], ridge)
        if weights is not None:
            errors[ridge] = squared_error(weights, gram[1], cross[1], held)
    if not errors:
        raise ValueError(
            f"no ridge of {order[0]:g} to {order[-1]:g} makes the sums solvable: "
            "the features hold nan or inf, or larger ridges are needed"
        )
    least = min(errors.values())
    most = least + slack * (abs(least) + held / 1000)
    return max(ridge for ridge, error in errors.items() if error <= most)
