"""Fisher importance of weights and the quadratic penalty of EWC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def accumulate_fisher(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    """Add the squared gradient of one sample to running Fisher sums, in place.

    Args:
        sums: name -> float64 running sum of squares.
        gradients: name -> gradient of one sample's log likelihood; None counts as zero.
    """
    for name, gradient in gradients.items():
        if gradient is not None:
            wide = gradient.detach().double()
            sums[name].addcmul_(wide, wide)


def decayed(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], decay: float
) -> dict[str, Tensor]:
    """Return the decayed importance ``decay * old + new``; a missing name counts as zero.

    The online form of Schwarz et al. 2018, arXiv:1805.06370; their gamma is ``decay``.

    Args:
        old: name -> importance up to the previous task.
        new: name -> importance for the task that ended.
        decay: 0 (only the last task counts) to 1 (all tasks count equally).

    Returns:
        name -> tensor in the dtype of ``old``, or of ``new`` if ``old`` lacks the name.
    """
    kept = {name: decay * value for name, value in old.items() if name not in new}
    mixed = {
        name: (decay * old[name].double() + value.double()).to(old[name].dtype)
        if name in old
        else value
        for name, value in new.items()
    }
    return {**kept, **mixed}


def quadratic_penalty(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor]
) -> Tensor:
    """Return the quadratic penalty: half the weighted squared distance of weights from anchors.

    1/2 * sum of F * (theta - theta*)^2, so the gradient is F * (theta - theta*).
    Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3 without its lambda.

    Args:
        weights: theta, the parameters.
        anchors: theta*, their values after the previous task, same shapes.
        importance: F, same shapes, at least 0.

    Returns:
        Scalar, at least 0, with a gradient into ``weights`` only.
    """
    if not weights:
        return torch.zeros(())
    value: Tensor = _QuadraticPenalty.apply(list(anchors), list(importance), *weights)
    return value


class _QuadraticPenalty(torch.autograd.Function):
    """Quadratic penalty whose gradient is computed along with its value.

    The gradient F * (theta - theta*) is needed for the value anyway, so it is saved for the
    backward pass. Three autograd operations per parameter would cost several times a step of a
    small model; ``torch._foreach`` is what torch.optim itself uses for lists of tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, anchors: list[Tensor], importance: list[Tensor], *weights: Tensor
    ) -> Tensor:
        distance = torch._foreach_sub(weights, anchors)
        gradient = torch._foreach_mul(distance, importance)
        ctx.gradient = gradient
        # F * d^2 is never negative, so its sum is its 1-norm, which has a kernel for lists.
        sums = torch._foreach_norm(torch._foreach_mul(distance, gradient), 1)
        return torch.stack(sums).sum() / 2

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *torch._foreach_mul(ctx.gradient, upstream[0]))
