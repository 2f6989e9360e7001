import csv
import io

import pytest

from mmcl.evaluation import AccuracyMatrix, Column
from mmcl.report import matrix_csv, matrix_latex, matrix_table
from mmcl.report.formatting import duration, format_count, format_metric, size, unit


def two_tasks(names=("a", "b")):
    matrix = AccuracyMatrix("s", "class", [Column(name) for name in names], [Column("p")])
    for row, column, value in [(0, 0, 0.1), (1, 0, 0.9), (2, 0, 0.5), (2, 1, 0.75), (2, 2, 0.0)]:
        matrix.set(row, column, value)
    return matrix


def test_the_table_shows_percent_dots_and_the_task_just_learned_in_brackets():
    lines = matrix_table(two_tasks()).split("\n")
    assert lines[0].split() == ["after,", "%", "1", "2", "e1"]
    assert lines[1].split() == ["0", "zero-shot", "10.0", "·", "·"]
    assert lines[2].split() == ["1", "a", "[90.0]", "·", "·"]
    assert lines[3].split() == ["2", "b", "50.0", "[75.0]", "0.0"]
    assert lines[4] == "eval-only task e1 = p"


def test_the_last_line_holds_the_main_figures_and_a_dot_for_an_undefined_one():
    last = " ".join(matrix_table(two_tasks(), width=300).split("\n")[-1].split())
    assert last == (
        "average accuracy 62.5 mean average accuracy 76.2 learning accuracy 82.5 "
        "forgetting +40.0 backward transfer -40.0 forward transfer ·"
    )


def test_a_wide_matrix_is_drawn_in_blocks_that_fit(make_matrix):
    matrix = make_matrix(tasks=[f"task number {i}" for i in range(30)], rows=31)
    lines = matrix_table(matrix, width=80).split("\n")
    assert max(map(len, lines)) <= 80
    heads = [word for line in lines if line.startswith("after") for word in line.split()[2:]]
    assert heads == [*map(str, range(1, 31)), "e1"]


def test_names_can_neither_style_the_table_nor_steer_the_terminal():
    names = ("[bold red]x[/]:smile:\x1b[2J", "b")
    table = matrix_table(two_tasks(names), is_colored=False)
    assert "[bold red]x[/]:smile:\ufffd[2J" in table
    assert "\x1b" not in table
    assert "\x1b[1m" in matrix_table(two_tasks(), is_colored=True)


def test_csv_holds_all_digits_and_empty_cells():
    matrix = two_tasks()
    matrix.set(2, 1, 1 / 3)
    rows = list(csv.reader(io.StringIO(matrix_csv(matrix))))
    assert rows[0] == ["after", "a", "b", "p"]
    assert rows[1] == ["zero-shot", "0.1", "", ""]
    assert float(rows[3][2]) == 1 / 3


def test_csv_does_not_let_a_sheet_run_a_name():
    assert '"\'=HYPERLINK(""x"")"' in matrix_csv(two_tasks(('=HYPERLINK("x")', "b")))


def test_latex_is_a_tabular_with_the_task_just_learned_in_bold():
    text = matrix_latex(two_tasks(("50%_a", r"\input{x}")))
    assert r"50\%\_a & \textbf{90.0} & -- & -- \\" in text
    assert r"\textbackslash{}input\{x\} & 50.0 & \textbf{75.0} & 0.0 \\" in text
    assert text.startswith(r"\begin{tabular}{lrrr}")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("average accuracy", 0.5, "50.0 %"),
        ("forgetting", 0.05, "+5.0 pp"),
        ("backward transfer", -0.05, "-5.0 pp"),
        ("Transfer (MTIL)", 0.5, "50.0 %"),
        ("zero-shot degradation", 0.1, "+10.0 pp"),
        ("retention of transfer", 0.5, "0.500 ×"),
        ("change of x", 0.1, "+10.0 pp"),
        ("forward (TiC)", 0.1, "10.0 %"),
    ],
)
def test_a_figure_is_written_in_its_unit(name, value, words):
    assert f"{format_metric(name, value)} {unit(name)}" == words


def test_sizes_times_and_counts_are_readable():
    assert [size(n) for n in (0, 1023, 2048, 5 * 2**30)] == ["0 B", "1023 B", "2.0 KiB", "5.0 GiB"]
    assert [duration(n) for n in (8.44, 59.99, 185, 7800)] == [
        "8.4 s",
        "60.0 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert [format_count(n) for n in (0, 9_999, 10_000, 4.5e6, 3e12, 2e16)] == [
        "0",
        "9999",
        "10.0 k",
        "4.5 M",
        "3.0 T",
        "2.0e+16",
    ]
