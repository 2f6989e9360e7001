import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.report import compare, matrix_table, plots
from mmcl.report.page import write_report
from tests.report.conftest import write_run


def a_matrix(shift="temporal", rows=3):
    tasks = [Column("2024", stage="cpt"), Column("2025", stage="cft")]
    probes = [Column("objects", ability="general"), Column("refusal", ability="safety")]
    matrix = AccuracyMatrix("years", "domain", tasks, probes, shift=shift)
    scores = [[0.1, 0.2, 0.8, 0.0], [0.6, 0.3, 0.5, 0.1], [0.4, 0.7, 0.9, 0.2]]
    for row, values in enumerate(scores[:rows]):
        for column, value in enumerate(values):
            matrix.set(row, column, value)
    return matrix


def test_the_page_has_the_map_of_time_and_the_probes_by_stage(tmp_path):
    a_matrix().write(tmp_path / "matrix.json")
    page = write_report(tmp_path).read_text()
    assert "Shift from task to task" in page
    assert (tmp_path / "figures" / "shift.svg").is_file()
    for name, value in (("in-domain", "65.0"), ("backward", "40.0"), ("forward", "30.0")):
        assert f'>{name} (TiC)</td><td class="number">{value} %' in page
    assert "<h2>Vertical forgetting</h2>" in page
    assert "cpt (2024)" in page
    assert "+30.0" in page
    assert "&#39;refusal&#39; scored 0 before training" in page


def test_a_page_without_declarations_has_neither(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "Vertical forgetting" not in page
    assert "Shift from task" not in page
    assert not (tmp_path / "figures" / "shift.svg").exists()


def test_a_stage_that_has_not_ended_says_so(tmp_path):
    a_matrix(rows=2).write(tmp_path / "matrix.json")
    page = write_report(tmp_path).read_text()
    assert "the stage has not ended: 1 of its 2 tasks are learned" in page
    assert "(the stage has not ended" in matrix_table(a_matrix(rows=2))


def test_the_terminal_shows_the_probes_and_their_losses():
    text = matrix_table(a_matrix())
    assert "50.0 (+30.0)" in text
    assert "vertical forgetting after cft (2025) -10.0" in text
    assert "in-domain (TiC) 65.0" in text


def test_a_map_needs_a_shift():
    with pytest.raises(ValueError, match="shift is None"):
        plots.shift_map(a_matrix(shift=None))


def test_compare_has_a_row_for_declared_metrics(tmp_path):
    for seed in (0, 1):
        (tmp_path / f"er-s{seed}").mkdir()
        write_run(tmp_path / f"er-s{seed}", seed=seed, stream="years")
        matrix = AccuracyMatrix.read(tmp_path / f"er-s{seed}" / "matrix.json")
        matrix.shift = "temporal"
        matrix.write(tmp_path / f"er-s{seed}" / "matrix.json")
    found = compare([tmp_path / "er-s0", tmp_path / "er-s1"])
    assert found.names[-3:] == ("in-domain (TiC)", "backward (TiC)", "forward (TiC)")
    assert all(stat.mean is not None for stat in found.groups[0].stats[-3:])
