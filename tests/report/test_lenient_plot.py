"""Strict and lenient scores on the page, in the table and in the heat map."""

import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.evaluation.run_files import RunFiles
from mmcl.report import matrix_csv, matrix_table, write_report
from mmcl.report.plots import heat_map, lenient_bars

STRICT = [[0.0, 0.1, 0.0], [0.8, 0.1, 0.2], [0.2, 0.9, 0.3], [0.1, 0.5, 0.7]]
LENIENT = [[0.4, 0.1, 0.0], [0.9, 0.1, 0.2], [0.7, 0.9, 0.3], [0.7, 0.8, 0.7]]
ATTACK = "<script>alert(1)</script>"


def a_matrix(values, scores=("exact/1", "vqa/1", "exact/1"), names=("one", "two", "three")):
    columns = [Column(*pair, 10) for pair in zip(names, ["instruction"] * 3, scores, strict=True)]
    matrix = AccuracyMatrix("s", "domain", columns)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            matrix.set(row, column, value)
    return matrix


@pytest.fixture
def folder(tmp_path):
    a_matrix(STRICT).write(tmp_path / "matrix.json")
    a_matrix(LENIENT).write(tmp_path / "lenient.json")
    return tmp_path


def rows_of(page):
    """The cells of the table of forms, row by row."""
    table = page.split("Format gap")[1].split("</table>")[0]
    rows = [row.split("<td")[1:] for row in table.split("<tr")[2:]]
    return [[cell.split(">")[1].split("<")[0] for cell in row] for row in rows]


def test_the_page_shows_the_format_gap_of_every_task(folder):
    page = write_report(folder).read_text("utf-8")
    assert rows_of(page) == [
        ["one", "10.0", "70.0", "+60.0"],
        ["two", "50.0", "80.0", "+30.0"],
        ["three", "70.0", "70.0", "+0.0"],
        ["average", "43.3", "73.3", "+30.0"],
        ["forgetting", "+55.0", "+15.0", "+40.0"],
    ]
    assert "lenient forgetting" in page
    assert (folder / "figures" / "form.svg").is_file()


def test_after_the_first_task_nothing_can_be_forgotten(folder):
    for name, values in (("matrix", STRICT), ("lenient", LENIENT)):
        a_matrix(values[:2]).write(folder / f"{name}.json")
    rows = rows_of(write_report(folder).read_text("utf-8"))
    assert rows == [["one", "80.0", "90.0", "+10.0"], ["average", "80.0", "90.0", "+10.0"]]


def test_without_lenient_scores_the_page_says_nothing_of_forms(folder):
    (folder / "lenient.json").unlink()
    page = write_report(folder).read_text("utf-8").replace(folder.name, "")
    for word in ("lenient", "Format lost", "Format gap"):
        assert word not in page
    assert not (folder / "figures" / "form.svg").exists()


def test_before_the_first_task_there_is_nothing_to_show(folder):
    a_matrix(STRICT[:1]).write(folder / "matrix.json")
    assert "Format gap" not in write_report(folder).read_text("utf-8")


def test_lenient_scores_that_cannot_be_read_are_named_on_the_page(folder):
    (folder / "lenient.json").write_text("[]")
    assert RunFiles.read(folder).lenient is None
    page = write_report(folder).read_text("utf-8")
    assert "lenient.json is not valid" in page
    assert "Format gap" not in page


def test_names_are_shown_and_never_run(folder):
    names = (ATTACK, "$x$", "three")
    a_matrix(STRICT, names=names).write(folder / "matrix.json")
    a_matrix(LENIENT, names=names).write(folder / "lenient.json")
    assert "<script" not in write_report(folder).read_text("utf-8")


def test_the_plot_is_the_same_each_time_and_shows_both_scores():
    strict, lenient = a_matrix(STRICT), a_matrix(LENIENT)
    svg = lenient_bars(strict, lenient, 3)
    assert svg == lenient_bars(strict, lenient, 3)
    for words in ("10.0 of 70.0", "50.0 of 80.0", "70.0 of 70.0", "in another form"):
        assert words.encode() in svg
    lenient.set(3, 0, None)
    assert b">10.0<" in lenient_bars(strict, lenient, 3)


def test_the_heat_map_names_the_score_of_each_column_where_they_differ():
    svg = heat_map(a_matrix(STRICT)).decode("utf-8")
    for words in ("one · exact/1", "two · vqa/1", "three · exact/1"):
        assert words in svg
    assert "exact" not in heat_map(a_matrix(STRICT, ("exact/1",) * 3)).decode("utf-8")


def test_the_table_names_scores_and_ends_with_the_lenient_metrics():
    text = matrix_table(a_matrix(STRICT), lenient=a_matrix(LENIENT)).splitlines()
    assert text[5:7] == ["score exact/1: column 1, 3", "score vqa/1: column 2"]
    assert text[-1] == "lenient average accuracy 73.3   lenient forgetting +15.0   format gap +30.0"
    one = matrix_table(a_matrix(STRICT, ("vqa/1",) * 3)).splitlines()
    assert one[5] == "score vqa/1"
    assert not any("lenient" in line for line in one)


def test_a_table_of_classes_is_what_it_was(make_matrix):
    text = matrix_table(make_matrix())
    assert "score" not in text
    assert "lenient" not in text
    assert matrix_csv(make_matrix()).startswith("after,zero-one")
