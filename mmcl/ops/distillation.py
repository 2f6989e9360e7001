"""Distillation: how far a student's answers are from a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor


def distil(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the divergence of a student's softened answers from a teacher's.

    KL(softmax(teacher / T) || softmax(student / T)) * T^2, mean over rows; the factor keeps the
    gradient's size when T changes. Hinton et al. 2015, arXiv:1503.02531.

    A column that is -inf (masked) on either side is left out of that row on both sides; a row with
    no column left counts as 0.

    Args:
        teacher: (B, C) scores, no gradient flows into them.
        student: (B, C) scores.
        temperature: above 0; larger is softer.

    Returns:
        Scalar, at least 0; 0 where both say the same.

    Raises:
        ValueError: if the shapes differ or the temperature is not positive.
    """
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher.shape)} and student {tuple(student.shape)}: "
            "cut both to the same columns"
        )
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: 2 is usual")
    left_out = (teacher == -torch.inf) | (student == -torch.inf)
    # A large finite number instead of -inf: the gradient of 0 * inf would be nan.
    least = torch.finfo(student.dtype).min / 2
    target = (teacher.detach() / temperature).masked_fill(left_out, least).log_softmax(1)
    answer = (student / temperature).masked_fill(left_out, least).log_softmax(1)
    gap = (target.exp() * (target - answer)).masked_fill(left_out, 0.0)
    return gap.sum(1).mean() * temperature**2


def distil_pairs(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the divergence of a student's matching of pairs from a teacher's, both ways round.

    The mean of picture-to-text and text-to-picture ``distil``.

    Args:
        teacher: (B, B) scaled likeness of picture i and text j, no gradient.
        student: (B, B) the same of the student.
        temperature: above 0.

    Returns:
        Scalar, at least 0.
    """
    by_image = distil(teacher, student, temperature)
    by_text = distil(teacher.T, student.T, temperature)
    return (by_image + by_text) / 2
