"""Metrics of a matrix with repeated tasks: defined where they are, else with the reason."""

from collections import Counter

import pytest

from mmcl.evaluation.class_metrics import compute_class_metrics
from mmcl.evaluation.continual_metrics import compute_all_metrics
from mmcl.evaluation.matrix import AccuracyMatrix, Column

UNDEFINED = {
    "forward transfer", "zero-shot degradation", "Transfer (MTIL)", "forward (TiC)",
    "unseen accuracy", "harmonic mean",
}  # fmt: skip
SCORES = [[0.1, 0.2], [0.9, 0.3], [0.5, 0.8], [0.7, 0.6], [0.6, 1.0]]


def cyclic():
    """Two tasks, each trained twice; every row has the scores of both occurrences."""
    columns = [Column("a"), Column("b"), Column("a (2)", repeat_of="a")]
    columns.append(Column("b (2)", repeat_of="b"))
    matrix = AccuracyMatrix("small", "class", columns)
    for row, values in enumerate(SCORES):
        for column, value in enumerate(values * 2):
            matrix.set(row, column, value)
    return matrix


def test_a_matrix_keeps_which_columns_are_repeats():
    read = AccuracyMatrix.from_json(cyclic().to_json())
    assert [column.repeat_of for column in read.columns] == ["", "", "a", "b"]
    assert read.to_json() == cyclic().to_json()


def test_a_matrix_without_repeats_has_no_key_for_them():
    assert "repeats" not in AccuracyMatrix("small", "class", [Column("a")]).to_json()


def test_a_repeat_of_no_column_is_refused():
    text = cyclic().to_json().replace('"repeats": ["", "", "a"', '"repeats": ["", "", "x"')
    with pytest.raises(ValueError, match="'repeats' names 'x', which is no column"):
        AccuracyMatrix.from_json(text)


def test_metrics_of_tasks_before_they_are_learned_are_undefined():
    found = {metric.name: metric for metric in compute_all_metrics(cyclic())}
    for name in UNDEFINED:
        assert found[name].value is None, name
    assert found["forward transfer"].reason == "'a (2)' was learned before, as 'a'"


def test_other_metrics_count_every_occurrence():
    found = {metric.name: metric.value for metric in compute_all_metrics(cyclic())}
    assert found["average accuracy"] == pytest.approx((0.6 + 1.0) / 2)
    assert found["learning accuracy"] == pytest.approx((0.9 + 0.8 + 0.7 + 1.0) / 4)
    lost = [0.9 - 0.6, 0.8 - 1.0, 0.7 - 0.6]
    assert found["forgetting"] == pytest.approx(sum(lost) / 3)


def test_classes_of_a_repeated_task_are_counted_once():
    confusions = {
        (row, column): Counter({("x", "x"): 3, ("x", "y"): 1})
        for row in range(5)
        for column in (0, 1)
    }
    metrics = compute_class_metrics(cyclic(), confusions)
    assert {metric.name: metric.samples for metric in metrics}["x"] == 8
