"""Lenient figures beside strict ones, by hand."""

import pytest

from mmcl.metrics import AccuracyMatrix, Column
from mmcl.metrics.leniency import lenient_beside, lenient_figures, read_lenient

STRICT = [[0.0, 0.0, 0.5], [0.8, 0.1, 0.4], [0.2, 0.9, 0.3]]
LENIENT = [[0.4, 0.2, None], [0.9, 0.2, None], [0.7, 1.0, None]]


def matrix(values=(), kinds=("answer", "answer"), probe="classify", tasks=2):
    scores = {"answer": "exact/1", "classify": "accuracy"}
    columns = [Column(f"t{n}", kind, scores[kind], 10) for n, kind in enumerate(kinds)]
    made = AccuracyMatrix("s", "domain", columns[:tasks], [Column("p", probe)])
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            made.set(row, column, value)
    return made


def values_of(figures):
    return {figure.name: figure.value for figure in figures}


def test_the_figures_are_those_that_a_person_computes():
    found = values_of(lenient_figures(matrix(STRICT), matrix(LENIENT)))
    assert found["lenient average accuracy"] == pytest.approx((0.7 + 1.0) / 2)
    assert found["lenient forgetting"] == pytest.approx(0.9 - 0.7)
    assert found["format gap"] == pytest.approx((0.5 + 0.1) / 2)


def test_a_task_of_classes_counts_with_the_score_that_it_has():
    kinds = ("answer", "classify")
    lenient = [[0.4, None, None], [0.9, None, None], [0.7, None, None]]
    found = values_of(lenient_figures(matrix(STRICT, kinds), matrix(lenient, kinds)))
    assert found["lenient average accuracy"] == pytest.approx((0.7 + 0.9) / 2)
    assert found["format gap"] == pytest.approx(0.5 / 2)


def test_what_was_not_measured_leaves_a_figure_without_a_value():
    lenient = [row if number < 2 else [None, 1.0, None] for number, row in enumerate(LENIENT)]
    for figure in lenient_figures(matrix(STRICT), matrix(lenient)):
        assert figure.value is None
        assert "not measured: 't0' in row 2" in figure.reason
    early = lenient_figures(matrix(STRICT), matrix(LENIENT), after=0)
    assert {figure.reason for figure in early} == {
        "no task is learned yet",
        "needs two learned tasks",
    }


def test_cells_are_kept_where_both_are_measured(tmp_path):
    matrix(LENIENT).write(tmp_path / "lenient.json")
    few = matrix(STRICT[:2])
    found = lenient_beside(few, tmp_path / "lenient.json")
    assert found.values == ((0.4, 0.2, None), (0.9, 0.2, None), (None, None, None))
    assert read_lenient(few, tmp_path).values == found.values


def test_a_run_without_lenient_scores_has_none(tmp_path):
    assert read_lenient(matrix(STRICT), tmp_path) is None


def test_scores_of_a_stream_that_has_grown_find_their_columns(tmp_path):
    matrix(LENIENT).write(tmp_path / "lenient.json")
    grown = matrix([], kinds=("answer",) * 3, tasks=3)
    for column in range(3):
        grown.set(1, column, 0.5)
    assert lenient_beside(grown, tmp_path / "lenient.json").values[1] == (0.9, 0.2, None, None)


def test_a_broken_file_is_told(tmp_path):
    (tmp_path / "lenient.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lenient\.json is no accuracy matrix"):
        read_lenient(matrix(STRICT), tmp_path)
