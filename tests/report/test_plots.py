import io
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from mmcl.evaluation import AccuracyMatrix, Column, Ledger, TaskCost
from mmcl.report import plots
from mmcl.report.plot_style import separate_labels

OF_A_MATRIX = [
    plots.heat_map,
    plots.task_curves,
    plots.seen_and_unseen,
    plots.forgetting_bars,
]


def words_of(svg):
    root = ElementTree.fromstring(svg)
    return [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("plot", OF_A_MATRIX)
def test_a_plot_is_svg_and_the_same_bytes_each_time(plot, make_matrix):
    matrix = make_matrix()
    svg = plot(matrix)
    assert svg == plot(matrix)
    ElementTree.fromstring(svg)


def test_the_heat_map_is_also_a_png(make_matrix):
    Image.open(io.BytesIO(plots.heat_map(make_matrix(), format="png"))).verify()


def test_the_heat_map_writes_every_value_and_a_dot_for_every_hole(make_matrix):
    matrix = make_matrix()
    matrix.set(0, 0, None)
    matrix.set(0, 1, 0.1234)
    words = words_of(plots.heat_map(matrix))
    assert words.count("·") == 1
    assert "12.3" in words
    assert len(words) == 6 * 6 + 6 + 6 + 1


@pytest.mark.slow
def test_a_heat_map_of_thirty_tasks_keeps_its_numbers_apart(make_matrix):
    matrix = make_matrix(tasks=[f"t{i}" for i in range(30)])
    svg = ElementTree.fromstring(plots.heat_map(matrix))
    assert float(svg.get("width").removesuffix("pt")) / 31 > 24


@pytest.mark.parametrize("plot", OF_A_MATRIX)
@pytest.mark.parametrize(
    "name", ["$\\frac{$", "<script>alert(1)</script>", "\x00\x1b\ud800", "日本 😀"]
)
def test_no_name_breaks_a_plot(plot, name, make_matrix):
    matrix = make_matrix(tasks=(name, "b", "c"), eval_only=(name + "2",))
    svg = plot(matrix)
    assert b"<script" not in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize("plot", OF_A_MATRIX)
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_run_that_has_hardly_begun_can_be_drawn(plot, rows, make_matrix):
    plot(make_matrix(rows=rows))
    plot(make_matrix(tasks=("only",), eval_only=(), rows=min(rows, 2)))


def test_scores_above_one_are_drawn_on_their_own_scale():
    matrix = AccuracyMatrix("s", "task", [Column("a", score="cider")])
    matrix.set(1, 0, 1.4)
    assert "140.0" in words_of(plots.heat_map(matrix))


def test_forgetting_shows_a_gain_as_negative():
    matrix = AccuracyMatrix("s", "task", [Column("a"), Column("b")])
    for row, column, value in [(1, 0, 0.5), (2, 0, 0.8), (2, 1, 0.9)]:
        matrix.set(row, column, value)
    assert "-30.0" in words_of(plots.forgetting_bars(matrix))


def test_costs_are_drawn_with_units():
    ledger = Ledger([TaskCost("a", 65.0, state_bytes=2048), TaskCost("b", 5.0)])
    words = words_of(plots.cost_bars(ledger))
    assert {"1 min 05 s", "5.0 s", "2.0 KiB", "0 B", "a", "b"} <= set(words)
    plots.cost_bars(Ledger())


def test_many_curves_are_thin_and_their_mean_is_named(make_matrix):
    words = words_of(plots.task_curves(make_matrix(tasks=[f"t{i}" for i in range(12)])))
    assert "mean" in " ".join(words)


def test_an_unknown_format_is_refused(make_matrix):
    with pytest.raises(ValueError, match="choose svg or png"):
        plots.heat_map(make_matrix(), "gif")


def test_labels_move_apart_and_stay_below_the_top():
    assert separate_labels([10.0, 11.0, 50.0], gap=5.0, highest=100.0) == [10.0, 15.0, 50.0]
    assert separate_labels([98.0, 99.0, 99.5], gap=5.0, highest=100.0) == [90.0, 95.0, 100.0]


@pytest.mark.slow
def test_importing_the_report_leaves_pyplot_alone():
    check = "import mmcl.report, sys; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
