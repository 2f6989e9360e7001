import math

import pytest
import torch

from mmcl.ops.kd import contrastive_kd_loss, kd_loss


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def softened(row, temperature):
    powers = [math.exp(score / temperature) for score in row]
    return [power / sum(powers) for power in powers]


def divergence(teacher, student, temperature):
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        t, s = softened(t_row, temperature), softened(s_row, temperature)
        total += sum(p * math.log(p / q) for p, q in zip(t, s, strict=True))
    return temperature**2 * total / len(teacher)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_distil_agrees_with_the_divergence_written_as_loops(temperature):
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student = torch.randn(5, 4, dtype=torch.float64)
    expected = divergence(teacher, student, temperature)
    assert float(kd_loss(teacher, student, temperature)) == pytest.approx(expected, rel=1e-10)


def test_a_student_that_says_the_same_has_no_loss_and_no_gradient():
    teacher = torch.randn(3, 4)
    student = teacher.clone().requires_grad_()
    loss = kd_loss(teacher, student)
    (slope,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-7)
    assert float(slope.abs().max()) < 1e-6


def test_no_gradient_flows_into_the_teacher():
    teacher = torch.randn(3, 4, requires_grad=True)
    kd_loss(teacher, torch.randn(3, 4, requires_grad=True)).backward()
    assert teacher.grad is None


def test_a_masked_column_is_left_out_as_if_it_were_not_there():
    teacher, student = torch.randn(3, 4), torch.randn(3, 4)
    expected = kd_loss(teacher[:, :3], student[:, :3])
    teacher[:, 3] = -torch.inf
    masked = student.clone().requires_grad_()
    loss = kd_loss(teacher, masked)
    torch.testing.assert_close(loss, expected)
    (slope,) = torch.autograd.grad(loss, masked)
    assert torch.equal(slope[:, 3], torch.zeros(3))
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(
        kd_loss(torch.randn(3, 4), torch.full((3, 4), -torch.inf)), torch.tensor(0.0)
    )


def test_pairs_are_distilled_in_both_directions():
    teacher = torch.randn(4, 4, dtype=torch.float64)
    student = torch.randn(4, 4, dtype=torch.float64)
    by_image = divergence(teacher, student, 2.0)
    by_text = divergence(teacher.T, student.T, 2.0)
    expected = (by_image + by_text) / 2
    assert float(contrastive_kd_loss(teacher, student, 2.0)) == pytest.approx(expected, rel=1e-10)


def test_wrong_values_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match="cut both to the same classes"):
        kd_loss(torch.randn(3, 4), torch.randn(3, 5))
    with pytest.raises(ValueError, match="temperature is 0"):
        kd_loss(torch.randn(3, 4), torch.randn(3, 4), 0)
