"""Figure, tables and section of a diagnostic."""

import csv
import io
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace

from mmcl.evaluation.diagnostic_record import DIAGNOSTICS, Panel, Series
from mmcl.report import write_report
from mmcl.report.diagnostic_output import (
    diagnostic_csv,
    diagnostic_table,
    draw_diagnostic,
    draw_trade_off,
    trade_off_table,
)
from tests.evaluation.test_diagnostic_record import record


def test_the_figure_is_an_svg_with_the_names_and_the_same_bytes_each_time():
    panels = (
        Panel("loss", (Series("$mean$ <b>", (1.0, None, 2.5)),)),
        Panel("score", (Series("task-a", (0.1, 0.2, 0.3)),), is_score=True),
    )
    one = record(panels=panels)
    svg = draw_diagnostic(one)
    text = " ".join(ElementTree.fromstring(svg).itertext())
    for word in ("loss", "score, %", "$mean$ <b>", "task-a", "mu"):
        assert word in text
    assert svg == draw_diagnostic(one)
    assert draw_diagnostic(one, "png").startswith(b"\x89PNG")


def test_a_figure_of_many_series_names_the_first_and_the_last():
    series = tuple(Series(f"task-{n:02d}", (0.0, 1.0, 2.0)) for n in range(12))
    svg = draw_diagnostic(record(panels=(Panel("loss", series),)))
    text = " ".join(ElementTree.fromstring(svg).itertext())
    assert "task-00" in text
    assert "task-11" in text
    assert "task-05" not in text


def test_a_figure_without_any_value_is_drawn():
    empty = Panel("loss", (Series("mean", (None, None, None)),))
    assert draw_diagnostic(record(panels=(empty,))).startswith(b"<?xml")


def test_the_csv_has_exact_values_and_empty_cells():
    rows = list(csv.reader(io.StringIO(diagnostic_csv(record()).decode())))
    assert rows == [["mu", "loss, mean"], ["0.0", "1.0"], ["0.5", ""], ["1.0", "2.5"]]


def test_the_table_shows_curves_reasons_and_notes():
    lines = diagnostic_table(record()).splitlines()
    assert lines[0] == "Between a and b"
    assert [line.split() for line in lines[2:6]] == [
        ["mu", "mean"], ["0", "1"], ["0.5", "-"], ["1", "2.5"],
    ]  # fmt: skip
    assert lines[6:] == ["barrier: undefined: a loss is inf", "No verdict."]


def test_a_wide_table_counts_the_columns_that_it_leaves_out():
    series = tuple(Series(f"task-{n}", (0.0, 1.0, 2.0)) for n in range(9))
    text = diagnostic_table(record(panels=(Panel("loss", series),)), max_columns=3)
    assert "6 more columns are in the csv file" in text
    assert "task-3" not in text


def test_the_report_has_a_section_of_diagnostics_with_escaped_names(tmp_path):
    page = write_report(tmp_path).read_text()
    assert "<h2>Diagnostics</h2>" not in page
    (tmp_path / DIAGNOSTICS).mkdir()
    record(title="Between <a> and b").write(tmp_path / DIAGNOSTICS / "one.json")
    page = write_report(tmp_path).read_text()
    assert "<h2>Diagnostics</h2>" in page
    assert "Between &lt;a&gt; and b" in page
    assert "Undefined: a loss is inf." in page
    assert page.count("<svg") == 1


def abilities(*scores):
    """Points of the values 0, 0.5, 1 and so on with these old and new scores."""
    return [
        SimpleNamespace(value=index / 2, old=old, new=new, mean=(old + new) / 2)
        for index, (old, new) in enumerate(scores)
    ]


def test_the_trade_off_names_every_value_and_joins_those_of_one_place():
    svg = draw_trade_off("alpha", abilities((0.9, 0.1), (0.6, 0.8), (0.6, 0.8)), 1)
    texts = ["".join(each.itertext()).strip() for each in ElementTree.fromstring(svg).iter()]
    for word in ("0", "0.5, 1", "old ability, %", "new ability, %", "best mean: alpha 0.5"):
        assert word in texts


def test_the_table_of_a_trade_off_marks_the_best_value():
    table = trade_off_table("scale", abilities((0.5, 0.25), (1.0, 0.5)), 1).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2] == ["0", "50.0", "25.0", "37.5", ""]
    assert cells[3] == ["0.5", "100.0", "50.0", "75.0", "best"]
