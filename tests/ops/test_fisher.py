import pytest
import torch

from mmcl.ops.fisher import accumulate_fisher, decayed, quadratic_penalty


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
