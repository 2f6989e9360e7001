"""The matrices are solved by hand; the third column beside a row of a table is the arithmetic."""

import math

import pytest

from mmcl.evaluation import MAIN, AccuracyMatrix, Column, compute_all_metrics
from mmcl.evaluation import continual_metrics as c

NONE = None
#            task 1, task 2, task 3, eval-only
SOLVED = [
    [0.10, 0.20, 0.40, 0.50],  # zero-shot
    [0.90, 0.30, 0.20, 0.40],
    [0.70, 0.80, 0.10, 0.60],
    [0.60, 0.90, 0.70, 0.25],
]


def matrix_of(values, tasks=3, sizes=(100, 50, 50, 10)):
    columns = [Column(f"t{i + 1}", size=sizes[i]) for i in range(len(values[0]))]
    rows = ["zero-shot", "t1", "t2", "t3"][: len(values)]
    matrix = AccuracyMatrix("s", "task", columns[:tasks], columns[tasks:], rows)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            matrix.set(row, column, value)
    return matrix


@pytest.mark.parametrize(
    ("figure", "after", "expected"),
    [
        (c.average_accuracy, None, (0.6 + 0.9 + 0.7) / 3),
        (c.average_accuracy, 3, (0.6 + 0.9 + 0.7) / 3),
        (c.average_accuracy, 2, (0.7 + 0.8) / 2),
        (c.average_accuracy, 1, 0.9),
        (c.pooled_accuracy, None, (60 + 45 + 35) / 200),
        (c.pooled_accuracy, 2, (70 + 40) / 150),
        (c.mean_average_accuracy, None, (0.9 + 0.75 + 2.2 / 3) / 3),
        (c.mean_average_accuracy, 2, (0.9 + 0.75) / 2),
        (c.learning_accuracy, None, (0.9 + 0.8 + 0.7) / 3),
        (c.learning_accuracy, 2, (0.9 + 0.8) / 2),
        (c.forgetting, None, ((0.9 - 0.6) + (0.8 - 0.9)) / 2),  # task 2 got better: not clamped
        (c.forgetting, 2, 0.9 - 0.7),
        (c.backward_transfer, None, ((0.6 - 0.9) + (0.9 - 0.8)) / 2),
        (c.backward_transfer, 2, 0.7 - 0.9),
        (c.forward_transfer, None, ((0.3 - 0.2) + (0.1 - 0.4)) / 2),
        (c.forward_transfer, 2, 0.3 - 0.2),
        (c.zero_shot_accuracy, None, 0.7 / 3),
        (c.mtil_transfer, None, (0.3 + (0.2 + 0.1) / 2) / 2),
        (c.mtil_transfer, 2, 0.3),
        (c.mtil_average, None, (0.9 + 0.3 + 0.2 + 0.7 + 0.8 + 0.1 + 0.6 + 0.9 + 0.7) / 9),
        (c.mtil_last, None, 2.2 / 3),
        (c.zero_shot_degradation, None, ((0.2 - 0.3) + (0.4 - 0.15)) / 2),
        (c.in_domain, None, 0.8),
        (c.backward_in_time, None, (0.7 + 0.6 + 0.9) / 3),
        (c.forward_in_time, None, (0.3 + 0.2 + 0.1) / 3),
        (c.unseen_accuracy, 0, 0.7 / 3),
        (c.unseen_accuracy, 1, (0.3 + 0.2) / 2),
        (c.unseen_accuracy, 2, 0.1),
        (c.harmonic_mean, 1, 2 * 0.9 * 0.25 / 1.15),
        (c.harmonic_mean, 2, 2 * 0.75 * 0.1 / 0.85),
    ],
)
def test_the_hand_solved_matrix(figure, after, expected):
    found = figure(matrix_of(SOLVED), after)
    assert found.reason is None
    assert found.value == pytest.approx(expected, abs=1e-12)


def test_forgetting_looks_for_the_best_score_between_learning_and_now():
    values = [[0.99, 0], [0.5, 0], [0.8, 0.4], [0.6, 0.4]]
    matrix = matrix_of([[*row, 0.3] for row in values])
    assert c.forgetting_of(matrix, 1).value == pytest.approx(0.8 - 0.6)  # not 0.5, not 0.99
    assert c.forgetting(matrix).value == pytest.approx((0.2 + 0.0) / 2)


def test_forgetting_from_zero_counts_lost_zero_shot_skill():
    found = c.forgetting(matrix_of([[0.9, 0.1], [0.5, 0.1], [0.4, 0.8]], tasks=2), from_zero=True)
    assert found.value == pytest.approx(0.9 - 0.4)
    assert found.name == "forgetting (from zero-shot)"


def test_forgetting_is_at_least_minus_backward_transfer():
    matrix = matrix_of(SOLVED)
    assert c.forgetting(matrix).value >= -c.backward_transfer(matrix).value - 1e-12


def test_backward_transfer_with_divisor_t_is_average_minus_learning_accuracy():
    matrix = matrix_of(SOLVED)
    found = c.backward_transfer(matrix, divisor="t")
    difference = c.average_accuracy(matrix).value - c.learning_accuracy(matrix).value
    assert found.value == pytest.approx(difference, abs=1e-12)
    assert found.value == pytest.approx(-0.2 / 3)
    assert found.name != c.backward_transfer(matrix).name
    assert found.definition.startswith("1/T ")


def test_an_unknown_divisor_is_refused():
    with pytest.raises(ValueError, match="choose 't-1' or 't'"):
        c.backward_transfer(matrix_of(SOLVED), divisor="T")


def test_an_eval_only_task_has_a_ratio_and_a_change():
    ratio, change, mean = c.eval_only_retention(matrix_of(SOLVED))
    assert (ratio.name, ratio.value) == ("retention of t4", 0.5)
    assert (change.name, change.value) == ("change of t4", -0.25)
    assert mean.value == -0.25


def test_an_eval_only_task_that_scored_zero_has_no_ratio_but_a_change():
    ratio, change, _ = c.eval_only_retention(matrix_of([[0.1, 0.0], [0.2, 0.3]], tasks=1))
    assert ratio.value is None
    assert "scored 0 before training" in ratio.reason
    assert change.value == 0.3


def test_without_eval_only_tasks_there_are_no_metrics_of_them():
    assert c.eval_only_retention(matrix_of([[0.1], [0.2]], tasks=1)) == []


def test_one_task_defines_what_needs_one_task_and_nothing_else():
    named = {each.name: each for each in compute_all_metrics(matrix_of([[0.2], [0.8]], tasks=1))}
    defined = {name: each.value for name, each in named.items() if each.value is not None}
    assert defined == {
        "average accuracy": 0.8,
        "pooled accuracy": 0.8,
        "mean average accuracy": 0.8,
        "learning accuracy": 0.8,
        "zero-shot accuracy": 0.2,
        "Avg (MTIL)": 0.8,
        "Last (MTIL)": 0.8,
        "in-domain (TiC)": 0.8,
    }
    for name in ("forgetting", "backward transfer", "forward transfer", "Transfer (MTIL)"):
        assert named[name].reason == "needs two learned tasks"
    assert named["unseen accuracy"].reason == "every task of the stream was learned"


def test_nothing_measured_defines_nothing():
    empty = matrix_of([[NONE] * 4] * 4)
    assert all(each.value is None and each.reason for each in compute_all_metrics(empty))
    assert all(each.value is None for each in compute_all_metrics(empty, after=3))


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("column", range(4))
def test_a_missing_cell_undefines_exactly_the_figures_that_depend_on_it(row, column):
    """A figure depends on a cell if another value there changes it."""
    whole, other, holed = matrix_of(SOLVED), matrix_of(SOLVED), matrix_of(SOLVED)
    other.set(row, column, SOLVED[row][column] + 5.0)
    low = matrix_of(SOLVED)
    low.set(row, column, SOLVED[row][column] - 5.0)
    holed.set(row, column, None)
    metrics = [compute_all_metrics(matrix, after=3) for matrix in (whole, other, low, holed)]
    for first, high, lower, last in zip(*metrics, strict=True):
        if first.value is None:
            continue
        depends = not math.isclose(first.value, high.value) or not math.isclose(
            first.value, lower.value
        )
        assert (last.value is None) == depends, first.name
        assert (last.reason is None) == (last.value is not None)


def test_a_hole_is_named_by_row_and_column():
    matrix = matrix_of(SOLVED)
    matrix.set(3, 1, None)
    assert c.average_accuracy(matrix).reason == "not measured: 't2' in row 3 (t3)"


def test_a_half_measured_last_row_is_still_the_last_row():
    matrix = matrix_of(SOLVED[:3] + [[0.6, NONE, NONE, NONE]])
    assert c.average_accuracy(matrix).value is None
    assert c.average_accuracy(matrix, after=2).value == pytest.approx(0.75)


def test_a_row_that_is_not_there_yet_is_a_reason_and_not_an_error():
    assert "only 1 tasks are learned" in c.average_accuracy(matrix_of(SOLVED[:2]), after=3).reason


def test_a_cell_of_zero_counts_as_zero():
    assert c.average_accuracy(matrix_of([[0.1], [0.0]], tasks=1)).value == 0.0
    assert c.harmonic_mean(matrix_of([[0.0, 0.0], [0.0, 0.0]], tasks=2)).value == 0.0


def test_pooled_accuracy_needs_sample_counts():
    found = c.pooled_accuracy(matrix_of(SOLVED, sizes=(100, 0, 50, 10)))
    assert found.reason == "number of test samples of 't2' is not known"


def test_more_tasks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="give 0 .before training. to 3 tasks"):
        compute_all_metrics(matrix_of(SOLVED), after=4)


def test_names_are_unique_and_the_main_ones_are_there():
    names = [each.name for each in compute_all_metrics(matrix_of(SOLVED))]
    assert len(set(names)) == len(names)
    assert set(MAIN) <= set(names)


def test_figures_after_k_tasks_equal_those_of_a_stream_that_ended_there():
    """Except for what is still to come: unseen accuracy and the harmonic mean."""
    short = matrix_of([row[:2] for row in SOLVED[:3]], tasks=2)
    named = {each.name: each.value for each in compute_all_metrics(short)}
    for each in compute_all_metrics(matrix_of(SOLVED), after=2):
        if each.name in named and each.name not in ("unseen accuracy", "harmonic mean"):
            assert each.value == named[each.name], each.name
