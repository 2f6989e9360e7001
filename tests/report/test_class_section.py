"""Classes on the report page and in classes.csv and confusion.csv."""

import csv
import io
import re

import pytest

from mmcl.evaluation import (
    AccuracyMatrix,
    Column,
    ConfusionMatrix,
    Prediction,
    predictions_path,
    write_predictions,
)
from mmcl.report import write_report
from mmcl.report.plots import confusion_map
from mmcl.report.tables import classes_csv
from tests.report.test_page import ATTACK, Tags

SAMPLES = 4
SVG_TEXT = re.compile(r"<text[^>]*>([^<]*)</text>")


def write_answers(folder, stream, types=None, mistakes=1):
    """A run whose every class loses ``mistakes`` of 4 samples with each later task.

    The wrong predictions are the first class of the row's task.
    """
    columns = [Column(f"t{n}", (types or {}).get(n, "classification")) for n in range(len(stream))]
    matrix = AccuracyMatrix("s", "class", columns)
    for row in range(len(stream) + 1):
        for column, classes in enumerate(stream):
            wrong = min(max(mistakes * (row - column - 1), 0), SAMPLES)
            other = stream[max(row - 1, column)][0]
            answers = [
                Prediction(f"{name}{n}", name, other if n < wrong else name, n >= wrong)
                for name in classes
                for n in range(SAMPLES)
            ]
            write_predictions(predictions_path(folder, row, column), answers)
            matrix.set(row, column, sum(each.correct for each in answers) / len(answers))
    matrix.write(folder / "matrix.json")
    (folder / "config.yaml").write_text("name: s\n")
    return folder


def cells_of(page, name):
    """Texts of the cells of a class's line in the table."""
    line = next(
        part for part in page.split("<tr>") if part.startswith(f'<td class="anywhere">{name}<')
    )
    return [text.strip() for text in re.findall(r"<td[^>]*>([^<]*)</td>", line)]


def table(folder, name):
    return list(csv.reader(io.StringIO((folder / name).read_text("utf-8"))))


@pytest.fixture
def without_plots(monkeypatch):
    """Leave the drawing out where a test is about something else."""
    monkeypatch.setattr("mmcl.report.page._draw", lambda *_: {})
    monkeypatch.setattr("mmcl.report.plots.heat_map", lambda *_: b"")


STREAM = [("ant", "bee"), ("cat", "dog"), ("elk", "fox")]


def test_the_page_has_accuracy_forgetting_and_confusions_of_every_class(tmp_path):
    page = write_report(write_answers(tmp_path, STREAM)).read_text("utf-8")
    assert cells_of(page, "ant") == ["ant", "t0", "4", "100.0", "50.0", "+50.0", "elk", "50.0"]
    assert cells_of(page, "dog") == ["dog", "t1", "4", "100.0", "75.0", "+25.0", "elk", "25.0"]
    assert cells_of(page, "fox") == ["fox", "t2", "4", "100.0", "100.0", "·", "–", "–"]
    assert 'title="no task was learned after the class"' in page
    assert "after task 3 (t2)" in page
    assert (tmp_path / "figures" / "confusion.svg").is_file()


@pytest.mark.usefixtures("without_plots")
def test_the_files_hold_the_numbers_with_all_digits_and_the_reasons(tmp_path):
    write_report(write_answers(tmp_path, STREAM))
    head, *rows = table(tmp_path, "classes.csv")
    lines = [dict(zip(head, row, strict=True)) for row in rows]
    assert [line["class"] for line in lines] == ["ant", "bee", "cat", "dog", "elk", "fox"]
    bee, fox = lines[1], lines[5]
    assert [bee[f"accuracy after {row}"] for row in ("zero-shot", "t0", "t1", "t2")] == [
        "1.0", "1.0", "0.75", "0.5",
    ]  # fmt: skip
    assert (bee["final accuracy"], bee["forgetting"], bee["undefined because"]) == (
        "0.5",
        "0.5",
        "",
    )
    assert (bee["most confused with"], bee["confused samples"]) == ("elk", "2")
    assert (fox["forgetting"], fox["most confused with"], fox["confused samples"]) == ("", "", "")
    assert fox["undefined because"] == "no task was learned after the class"
    assert table(tmp_path, "confusion.csv") == [
        ["target, predicted after t2", "ant", "bee", "cat", "dog", "elk", "fox"],
        ["ant", "2", "0", "0", "0", "2", "0"],
        ["bee", "0", "2", "0", "0", "2", "0"],
        ["cat", "0", "0", "3", "0", "1", "0"],
        ["dog", "0", "0", "0", "3", "1", "0"],
        ["elk", "0", "0", "0", "0", "4", "0"],
        ["fox", "0", "0", "0", "0", "0", "4"],
    ]


@pytest.mark.usefixtures("without_plots")
def test_an_earlier_row_is_shown_as_if_the_stream_ended_there(tmp_path):
    page = write_report(write_answers(tmp_path, STREAM), after_task=2).read_text("utf-8")
    assert cells_of(page, "ant") == ["ant", "t0", "4", "100.0", "75.0", "+25.0", "cat", "25.0"]
    assert "elk" not in page
    assert "after task 2 (t1)" in page
    assert len(table(tmp_path, "confusion.csv")) == 5


@pytest.mark.parametrize("after", [0, 4, -1])
def test_a_row_that_is_not_there_is_refused(tmp_path, after):
    write_answers(tmp_path, STREAM)
    with pytest.raises(ValueError, match=f"after_task is {after}, and 3 tasks are measured"):
        write_report(tmp_path, after)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("without_plots")
def test_missing_predictions_are_blank_with_a_reason_and_no_old_table_stays(tmp_path):
    write_report(write_answers(tmp_path, STREAM))
    predictions_path(tmp_path, 3, 0).unlink()
    page = write_report(tmp_path).read_text("utf-8")
    reason = "no predictions of &#39;t0&#39; in row 3 (t2)"
    assert f"There is no confusion matrix: {reason}." in page
    assert cells_of(page, "ant") == ["ant", "t0", "4", "100.0", "·", "·", "–", "–"]
    assert f'title="{reason}"' in page
    assert not (tmp_path / "confusion.csv").exists()


@pytest.mark.usefixtures("without_plots")
def test_a_run_without_classes_has_no_such_section(tmp_path):
    kinds = dict.fromkeys(range(3), "instruction")
    page = write_report(write_answers(tmp_path, STREAM, kinds)).read_text("utf-8")
    assert "<h2>Classes</h2>" not in page
    assert not (tmp_path / "classes.csv").exists()
    with pytest.raises(ValueError, match="with a classification task among the first"):
        write_report(tmp_path, 1)
    with pytest.raises(ValueError, match="no classes to write"):
        classes_csv([])


@pytest.mark.usefixtures("without_plots")
def test_tasks_without_classes_are_named(tmp_path):
    page = write_report(write_answers(tmp_path, STREAM, {1: "instruction"})).read_text("utf-8")
    assert "Tasks without classes are left out: t1." in page
    assert [row[0] for row in table(tmp_path, "classes.csv")[1:]] == ["ant", "bee", "elk", "fox"]


def test_hostile_class_names_are_shown_and_never_run(tmp_path):
    names = [(ATTACK, "=cmd|' /C calc'!A0"), ("$\\frac{$\x1b[2J", "@x")]
    page = write_report(write_answers(tmp_path, names)).read_text("utf-8")
    seen = Tags(page)
    assert "script" not in seen.tags
    assert seen.handlers == []
    assert "\x1b" not in page
    assert all(address.startswith(("data:image/png", "#")) for address in seen.addresses)
    cells = [
        cell
        for name in ("classes.csv", "confusion.csv")
        for row in table(tmp_path, name)
        for cell in row
    ]
    assert "'=cmd|' /C calc'!A0" in cells
    assert "'@x" in cells
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@")]


def test_many_classes_are_grouped_and_cut_so_that_the_page_stays_small(tmp_path):
    stream = [[f"t{task} class {n:03}" for n in range(60)] for task in range(3)]
    page = write_report(write_answers(tmp_path, stream)).read_text("utf-8")
    assert "60 of 180 classes are shown, those that lost most; all are in classes.csv." in page
    assert "Neighboring classes are summed" in page
    assert {cells_of(page, name)[5] for name in stream[0]} == {"+50.0"}
    assert len(table(tmp_path, "confusion.csv")) == len(table(tmp_path, "classes.csv")) == 181
    svg = (tmp_path / "figures" / "confusion.svg").read_text()
    assert {"t0 (60)", "t1 (60)", "t2 (60)"} <= set(SVG_TEXT.findall(svg))
    assert len(page) < 250_000


@pytest.mark.usefixtures("without_plots")
def test_a_thousand_classes_are_the_most_that_confusion_csv_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("mmcl.report.page._MAX_CSV_CLASSES", 5)
    page = write_report(write_answers(tmp_path, STREAM)).read_text("utf-8")
    assert "confusion.csv is left out: it is written for up to 5." in page
    assert not (tmp_path / "confusion.csv").exists()
    assert (tmp_path / "classes.csv").is_file()


def test_the_plot_shows_the_percent_of_each_row():
    counts = {(0, 0): 3, (0, 1): 1, (1, 0): 1, (1, 1): 1}
    svg = confusion_map(ConfusionMatrix(("ant", "bee", "cat"), ("a", "b", ""), counts)).decode()
    texts = SVG_TEXT.findall(svg)
    assert sorted(text for text in texts if text.isdigit()) == ["25", "50", "50", "75"]
    assert texts.count("ant") == texts.count("cat") == 2


def test_a_full_plot_of_sixty_classes_is_not_large():
    names = tuple(f"class {n}" for n in range(60))
    counts = {(i, j): 1 + (i * j) % 7 for i in range(60) for j in range(60)}
    assert len(confusion_map(ConfusionMatrix(names, ("a",) * 60, counts))) < 500_000
