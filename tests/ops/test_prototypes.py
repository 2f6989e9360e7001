import numpy as np
import pytest
import torch

from mmcl.ops.prototypes import (
    choose_ridge,
    class_sums,
    cosine_scores,
    one_hot,
    random_projection,
    solve_ridge,
    squared_error,
)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def test_class_sums_agree_with_a_loop_over_samples():
    features, labels = torch.randn(9, 4), torch.tensor([0, 2, 1, 0, 2, 2, 0, 1, -100])
    sums, counts = class_sums(features, labels, 4)
    expected = np.zeros((4, 4))
    for feature, label in zip(features.double().numpy(), labels.tolist(), strict=True):
        if label >= 0:
            expected[label] += feature / np.linalg.norm(feature)
    np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert counts.tolist() == [3, 2, 3, 0]
    assert sums.dtype == torch.float64
    assert counts.dtype == torch.int64


def test_scores_are_cosines_with_class_means_and_an_unmet_class_is_impossible():
    features, labels = torch.randn(20, 4), torch.arange(20) % 3
    sums, counts = class_sums(features, labels, 4)
    scores = cosine_scores(features, sums, counts)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1)[:, None]
    for label in range(3):
        mean = unit[labels.numpy() == label].mean(0)
        expected = unit @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(scores[:, label].numpy(), expected, rtol=1e-10)
    assert torch.equal(scores[:, 3], torch.full((20,), -torch.inf, dtype=torch.float64))


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(ValueError, match="label 3 is outside the 3 classes"):
        one_hot(torch.tensor([0, 3]), 3)


def sums_of(rows, seed=0):
    g = torch.Generator().manual_seed(seed)
    lifted = torch.randn(rows, 6, generator=g, dtype=torch.float64)
    targets = one_hot(torch.randint(3, (rows,), generator=g), 3)
    return lifted, targets


def test_the_solution_from_sums_is_the_ridge_solution_of_the_samples():
    lifted, targets = sums_of(40)
    weights = solve_ridge(lifted.T @ lifted, lifted.T @ targets, 0.3)
    # Ridge as least squares on samples extended by sqrt(ridge) times the unit matrix.
    rows = np.concatenate([lifted.numpy(), np.sqrt(0.3) * np.eye(6)])
    wanted = np.concatenate([targets.numpy(), np.zeros((6, 3))])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(weights.numpy(), expected, atol=1e-10)


def test_the_error_from_sums_is_the_error_over_the_samples():
    lifted, targets = sums_of(40)
    weights = torch.randn(6, 3, dtype=torch.float64)
    expected = 0.0
    for row, target in zip(lifted, targets, strict=True):
        expected += float(((row @ weights - target) ** 2).sum())
    found = squared_error(weights, lifted.T @ lifted, lifted.T @ targets, 40)
    assert found == pytest.approx(expected, rel=1e-10)


def test_sums_that_cannot_be_solved_give_none():
    assert solve_ridge(-torch.eye(3, dtype=torch.float64), torch.ones(3, 1).double(), 0.5) is None


def test_the_ridge_with_the_least_held_out_error_is_chosen():
    lifted, targets = sums_of(12)
    held, held_targets = sums_of(200, seed=1)
    ridges = [10.0**power for power in range(-4, 5)]
    errors = {}
    for ridge in ridges:
        weights = torch.linalg.solve(
            lifted.T @ lifted + ridge * torch.eye(6, dtype=torch.float64), lifted.T @ targets
        )
        errors[ridge] = float(((held @ weights - held_targets) ** 2).sum())
    chosen = choose_ridge(
        (lifted.T @ lifted, held.T @ held),
        (lifted.T @ targets, held.T @ held_targets),
        200,
        ridges,
    )
    assert chosen == min(errors, key=errors.__getitem__)


def test_without_held_out_samples_the_middle_ridge_is_taken():
    nothing = torch.zeros(2, 2)
    assert choose_ridge((nothing, nothing), (nothing, nothing), 0, [1.0, 0.01, 100.0]) == 1.0


def test_features_that_are_not_numbers_leave_no_ridge():
    broken = torch.full((2, 2), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="no ridge of 1 to 10 makes the sums solvable"):
        choose_ridge((broken, broken), (broken, broken), 1, [1.0, 10.0])


def test_lifted_features_forget_length_and_are_never_negative():
    features, projection = torch.randn(5, 4), torch.randn(4, 9, dtype=torch.float64)
    lifted = random_projection(features, projection)
    torch.testing.assert_close(
        lifted, random_projection(7 * features, projection), rtol=1e-6, atol=1e-7
    )
    expected = np.maximum(
        features.double().numpy()
        / np.linalg.norm(features.double().numpy(), axis=1)[:, None]
        @ projection.numpy(),
        0,
    )
    np.testing.assert_allclose(lifted.numpy(), expected, rtol=1e-10)
