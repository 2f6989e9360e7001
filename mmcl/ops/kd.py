"""Knowledge-distillation losses between the scores of a teacher and of a student."""

from __future__ import annotations

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
        Scalar, at least 0; 0 if both distributions are equal.

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
    left_out = (teacher == -torch.inf) | (student == -torch.inf)
    # A large finite number instead of -inf: the gradient of 0 * inf would be nan.
    least = torch.finfo(student.dtype).min / 2
    target = (teacher.detach() / temperature).masked_fill(left_out, least).log_softmax(1)
    prediction = (student / temperature).masked_fill(left_out, least).log_softmax(1)
    gap = (target.exp() * (target - prediction)).masked_fill(left_out, 0.0)
    return gap.sum(1).mean() * temperature**2


def contrastive_kd_loss(teacher: Tensor, student: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the distillation loss of contrastive scores: mean of image-to-text and text-to-image.

    Args:
        teacher: (B, B) scaled cosine similarity of image i and text j, no gradient.
        student: (B, B) the same of the student.
        temperature: above 0.

    Returns:
        Scalar, at least 0.
    """
    by_image = kd_loss(teacher, student, temperature)
    by_text = kd_loss(teacher.T, student.T, temperature)
    return (by_image + by_text) / 2
