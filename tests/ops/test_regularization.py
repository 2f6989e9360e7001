import math

import pytest
import torch

from mmcl.ops.gradient_projection import agem_projection, dot
from mmcl.ops.regularization import (
    accumulate_fisher,
    contrastive_kd_loss,
    decayed,
    kd_loss,
    quadratic_penalty,
)
from mmcl.ops.weight_interpolation import interpolate


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


def some(seed):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(3, 2, generator=g),
        torch.randn(5, generator=g),
        torch.randn((), generator=g),
    ]


def test_squares_are_summed_sample_by_sample_in_float64():
    sums = {"w": torch.zeros(2, dtype=torch.float64)}
    for gradient in ([1.0, -2.0], [1e-12, 0.5]):
        accumulate_fisher(sums, {"w": torch.tensor(gradient)})
    accumulate_fisher(sums, {"w": None})
    torch.testing.assert_close(
        sums["w"], torch.tensor([1.0, 4.25], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_pull_back_agrees_with_the_sum_written_as_loops():
    weights, anchors, importance = some(0), some(1), [value.abs() for value in some(2)]
    expected = 0.0
    for w, a, f in zip(weights, anchors, importance, strict=True):
        for one, anchor, weight in zip(
            w.flatten().tolist(), a.flatten().tolist(), f.flatten().tolist(), strict=True
        ):
            expected += 0.5 * weight * (one - anchor) ** 2
    assert float(quadratic_penalty(weights, anchors, importance)) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_gradient_of_pull_back_is_importance_times_distance():
    weights = [value.requires_grad_() for value in some(0)]
    anchors, importance = some(1), [value.abs() for value in some(2)]
    slopes = torch.autograd.grad(3 * quadratic_penalty(weights, anchors, importance), weights)
    for slope, w, a, f in zip(slopes, weights, anchors, importance, strict=True):
        torch.testing.assert_close(slope, 3 * f * (w.detach() - a))


def test_weights_at_their_anchors_are_not_pulled():
    weights = [value.requires_grad_() for value in some(0)]
    value = quadratic_penalty(weights, some(0), some(1))
    assert float(value.detach()) == 0.0
    slopes = torch.autograd.grad(value, weights)
    assert all(float(slope.abs().sum()) == 0.0 for slope in slopes)


def test_nothing_to_pull_is_zero():
    assert float(quadratic_penalty([], [], [])) == 0.0


def test_old_importance_decays_and_a_new_weight_starts_from_zero():
    old = {"kept": torch.tensor([2.0]), "gone": torch.tensor([4.0])}
    new = {
        "kept": torch.tensor([1.0], dtype=torch.float64),
        "fresh": torch.tensor([3.0], dtype=torch.float64),
    }
    mixed = decayed(old, new, 0.5)
    assert {name: float(value) for name, value in mixed.items()} == {
        "kept": 2.0,
        "gone": 2.0,
        "fresh": 3.0,
    }
    assert mixed["kept"].dtype == torch.float32


SHAPES = [(3, 4), (5,), (), (2, 2, 2)]


def pieces(seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=dtype) for shape in SHAPES]


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_the_inner_product_is_that_of_the_long_vector():
    left, right = pieces(0), pieces(1)
    torch.testing.assert_close(dot(left, right), flat(left) @ flat(right))


@pytest.mark.parametrize("seed", range(6))
def test_projection_is_that_of_the_long_vector(seed):
    gradient, reference = pieces(seed), pieces(seed + 100)
    g, r = flat(gradient), flat(reference)
    expected = g - (g @ r) / (r @ r) * r if g @ r < 0 else g
    edited, is_changed = agem_projection(gradient, reference)
    torch.testing.assert_close(flat(edited), expected)
    assert is_changed == bool(g @ r < 0)
    assert float(flat(edited) @ r) > -1e-12


def test_without_conflict_the_very_tensors_come_back():
    gradient = pieces(0)
    edited, is_changed = agem_projection(gradient, gradient)
    assert not is_changed
    assert all(mine is given for mine, given in zip(edited, gradient, strict=True))


def test_a_reference_of_zeros_changes_nothing():
    edited, is_changed = agem_projection(pieces(0), [torch.zeros(shape) for shape in SHAPES])
    assert not is_changed
    torch.testing.assert_close(flat(edited), flat(pieces(0)))


def test_by_hand():
    # (1, -1) against (0, 2): the second coordinate is removed.
    edited, _ = agem_projection([torch.tensor([1.0, -1.0])], [torch.tensor([0.0, 2.0])])
    assert edited[0].tolist() == [1.0, 0.0]


def test_half_precision_is_summed_in_more():
    ones = [torch.ones(100_000, dtype=torch.bfloat16)]
    assert float(dot(ones, ones)) == 100_000


def test_missing_pieces_are_named():
    with pytest.raises(ValueError, match="left has 4 tensors and right has 3"):
        dot(pieces(0), pieces(1)[:3])


def test_the_ends_are_exact():
    start, end = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    assert torch.equal(interpolate(start, end, 0.0)["w"], start["w"])
    assert torch.equal(interpolate(start, end, 1.0)["w"], end["w"])


def test_the_point_between_agrees_with_plain_numbers():
    between = interpolate({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}, 0.25)
    assert between["w"].tolist() == [1.5, 1.0]


def test_counts_and_names_of_one_side_are_left_out():
    start = {"w": torch.zeros(1), "steps": torch.tensor([3]), "gone": torch.zeros(1)}
    end = {"w": torch.ones(1), "steps": torch.tensor([5]), "fresh": torch.ones(1)}
    assert set(interpolate(start, end, 0.5)) == {"w"}


def test_a_weight_that_grew_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'head' has shape \(2,\) in start and \(3,\) in end"):
        interpolate({"head": torch.zeros(2)}, {"head": torch.zeros(3)}, 0.5)
