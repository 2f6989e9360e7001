"""Lenient metrics next to strict ones, computed by hand."""

import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.evaluation.continual_metrics import compute_lenient_metrics
from mmcl.evaluation.run_files import align_lenient_matrix, read_lenient

STRICT = [[0.0, 0.0, 0.5], [0.8, 0.1, 0.4], [0.2, 0.9, 0.3]]
LENIENT = [[0.4, 0.2, None], [0.9, 0.2, None], [0.7, 1.0, None]]


def matrix(values=(), kinds=("instruction", "instruction"), eval_only="classification", tasks=2):
    scores = {"instruction": "exact/1", "classification": "accuracy"}
    columns = [Column(f"t{n}", kind, scores[kind], 10) for n, kind in enumerate(kinds)]
    made = AccuracyMatrix("s", "domain", columns[:tasks], [Column("p", eval_only)])
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            made.set(row, column, value)
    return made


def values_of(metrics):
    return {metric.name: metric.value for metric in metrics}


def test_the_figures_are_those_that_a_person_computes():
    found = values_of(compute_lenient_metrics(matrix(STRICT), matrix(LENIENT)))
    assert found["lenient average accuracy"] == pytest.approx((0.7 + 1.0) / 2)
    assert found["lenient forgetting"] == pytest.approx(0.9 - 0.7)
    assert found["format gap"] == pytest.approx((0.5 + 0.1) / 2)


def test_a_task_of_classes_counts_with_the_score_that_it_has():
    kinds = ("instruction", "classification")
    lenient = [[0.4, None, None], [0.9, None, None], [0.7, None, None]]
    found = values_of(compute_lenient_metrics(matrix(STRICT, kinds), matrix(lenient, kinds)))
    assert found["lenient average accuracy"] == pytest.approx((0.7 + 0.9) / 2)
    assert found["format gap"] == pytest.approx(0.5 / 2)


def test_what_was_not_measured_leaves_a_figure_without_a_value():
    lenient = [row if number < 2 else [None, 1.0, None] for number, row in enumerate(LENIENT)]
    for figure in compute_lenient_metrics(matrix(STRICT), matrix(lenient)):
        assert figure.value is None
        assert "not measured: 't0' in row 2" in figure.reason
    early = compute_lenient_metrics(matrix(STRICT), matrix(LENIENT), after=0)
    assert {figure.reason for figure in early} == {
        "no task is learned yet",
        "needs two learned tasks",
    }


def test_cells_are_kept_where_both_are_measured(tmp_path):
    matrix(LENIENT).write(tmp_path / "lenient.json")
    few = matrix(STRICT[:2])
    found = align_lenient_matrix(few, tmp_path / "lenient.json")
    assert found.values == ((0.4, 0.2, None), (0.9, 0.2, None), (None, None, None))
    assert read_lenient(few, tmp_path).values == found.values


def test_a_run_without_lenient_scores_has_none(tmp_path):
    assert read_lenient(matrix(STRICT), tmp_path) is None


def test_scores_of_a_stream_that_has_grown_find_their_columns(tmp_path):
    matrix(LENIENT).write(tmp_path / "lenient.json")
    grown = matrix([], kinds=("instruction",) * 3, tasks=3)
    for column in range(3):
        grown.set(1, column, 0.5)
    assert align_lenient_matrix(grown, tmp_path / "lenient.json").values[1] == (
        0.9,
        0.2,
        None,
        None,
    )


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "lenient.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lenient\.json is not valid"):
        read_lenient(matrix(STRICT), tmp_path)
