"""Regularization by distillation (KL of scores) and by the Fisher penalty on weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def kd_loss(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the distillation loss: KL divergence of softened student scores from the teacher's.

    KL(softmax(teacher / T) || softmax(student / T)) * T^2, mean over samples; the factor keeps the
    scale of the gradient when T changes. Hinton et al. 2015, arXiv:1503.02531.

    A class that is -inf (masked) on either side is left out of that sample on both sides; a sample
    without any class left counts as 0.

    Args:
        teacher: (B, C) scores, no gradient flows into them.
        student: (B, C) scores.
        temperature: above 0; larger is softer.

    Returns:
        Scalar, at least 0; 0 if both distributions are equal. Half-precision scores are widened to
        float32 first.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)} and student {tuple(student.shape)}: "
            "cut both to the same classes"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: 2 is usual")
    wide = torch.promote_types(student.dtype, torch.float32)
    teacher, student = teacher.to(wide), student.to(wide)
    left_out = (teacher == -torch.inf) | (student == -torch.inf)
    # A large finite number instead of -inf: the gradient of 0 * inf would be nan.
    least = torch.finfo(student.dtype).min / 2
    target = (teacher.detach() / temperature).masked_fill(left_out, least).log_softmax(1)
    prediction = (student / temperature).masked_fill(left_out, least).log_softmax(1)
    gap = (target.exp() * (target - prediction)).masked_fill(left_out, 0.0)
    return gap.sum(1).mean() * temperature**2


def contrastive_kd_loss(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the distillation loss of contrastive scores: mean of image-to-text and text-to-image.

    Teacher and student are (B, B) scaled cosine similarities of image i and text j; the result is a
    scalar of at least 0.
    """
    by_image = kd_loss(teacher, student, temperature)
    by_text = kd_loss(teacher.T, student.T, temperature)
    return (by_image + by_text) / 2


def accumulate_fisher(sums: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]) -> None:
    """Add the squared gradient of one sample to running Fisher sums (float64), in place.

    The gradients are those of one sample's log likelihood; None counts as zero.
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
