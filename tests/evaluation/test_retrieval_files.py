"""Recalls of a run's cells: their file, the table of the terminal, the csv, the page."""

import json

import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.evaluation.retrieval import Retrieval, RetrievalScores
from mmcl.evaluation.run_files import RETRIEVAL, RunFiles, read_retrieval, write_retrieval
from mmcl.report import retrieval_table, write_report

NAMES = ("birds", "<b>boats</b>")


def a_matrix(rows=3):
    columns = [Column(name, "captioning", "recall@1", 10) for name in NAMES]
    matrix = AccuracyMatrix("s", "domain", columns)
    for row in range(rows):
        for column in range(2):
            matrix.set(row, column, 0.5)
    return matrix


def scores(after, task, first=0.25):
    found = Retrieval({1: first, 5: 0.5, 10: 0.75}, {1: 0.125, 5: 0.375, 10: 1.0}, 40, 8)
    return RetrievalScores.of(found, after, task)


def written(folder, matrix):
    for row in matrix.rows:
        write_retrieval(matrix, folder, [scores(row, task) for task in NAMES])


def test_recalls_come_back_in_the_order_of_the_matrix(tmp_path):
    matrix = a_matrix()
    for row in reversed(matrix.rows):
        write_retrieval(matrix, tmp_path, [scores(row, NAMES[1]), scores(row, NAMES[0])])
    found = read_retrieval(matrix, tmp_path)
    assert [(each.after, each.task) for each in found] == [
        (row, task) for row in matrix.rows for task in NAMES
    ]
    assert found[0] == scores(matrix.rows[0], NAMES[0])


def test_a_cell_measured_again_replaces_its_recalls(tmp_path):
    matrix = a_matrix()
    written(tmp_path, matrix)
    write_retrieval(matrix, tmp_path, [scores(matrix.rows[1], NAMES[0], 1.0)])
    found = read_retrieval(matrix, tmp_path)
    assert len(found) == 6
    assert [each.image_to_text["1"] for each in found] == [0.25, 0.25, 1.0, 0.25, 0.25, 0.25]


def test_recalls_of_cells_that_the_matrix_lacks_are_left_out(tmp_path):
    written(tmp_path, a_matrix())
    assert len(read_retrieval(a_matrix(rows=2), tmp_path)) == 4
    assert read_retrieval(a_matrix(), tmp_path / "other") == []


@pytest.mark.parametrize("content", ["{}", "[{}]", "[3]", "no json"])
def test_another_file_is_named(tmp_path, content):
    (tmp_path / RETRIEVAL).write_text(content)
    with pytest.raises(ValueError, match="retrieval.json"):
        read_retrieval(a_matrix(), tmp_path)
    a_matrix().write(tmp_path / "matrix.json")
    assert any("retrieval.json" in note for note in RunFiles.read(tmp_path).notes)


def test_the_table_has_the_last_row_both_ways():
    text = retrieval_table([scores("birds", "birds"), scores("boats", "birds", 1.0)])
    lines = text.split("\n")
    assert len(lines) == 3
    assert "after boats" in lines[0]
    numbers = ["8", "40", "100.0", "50.0", "75.0", "12.5", "37.5", "100.0"]
    assert lines[2].split() == ["birds", *numbers]


def test_the_page_and_the_csv_have_the_recalls(tmp_path):
    matrix = a_matrix()
    matrix.write(tmp_path / "matrix.json")
    written(tmp_path, matrix)
    page = write_report(tmp_path).read_text()
    section = page.split("<h2>Retrieval</h2>")[1].split("</section>")[0]
    assert section.count("<tr>") == 3
    assert "<b>boats" not in page
    assert ">37.5<" in section
    lines = (tmp_path / "retrieval.csv").read_text().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("after,task,images,texts,image to text R@1")
    (tmp_path / RETRIEVAL).unlink()
    assert "<h2>Retrieval</h2>" not in write_report(tmp_path).read_text()
    assert not (tmp_path / "retrieval.csv").exists()


def test_the_file_has_numbers_of_every_k(tmp_path):
    write_retrieval(a_matrix(), tmp_path, [scores("birds", "birds")])
    (entry,) = json.loads((tmp_path / RETRIEVAL).read_text())
    assert entry["text_to_image"] == {"1": 0.125, "5": 0.375, "10": 1.0}
    assert (entry["images"], entry["texts"]) == (8, 40)
