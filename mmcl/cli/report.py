"""``mmcl report <run>``: write the report page of a run again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.cli.parser import CommandParser
from mmcl.cli.train import run_folder
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.run_files import MATRIX, read_lenient
from mmcl.report import compare, matrix_csv, matrix_latex, matrix_table, write_report


def main(argv: Sequence[str]) -> int:
    """Write report.html of a run, finished or not, and print its accuracy matrix."""
    parser = CommandParser(prog="mmcl report", description=main.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("text", "csv", "latex"),
        default="text",
        help="format of the printed matrix (%(default)s)",
    )
    given = parser.parse_args(argv)
    folder = run_folder(given.run)
    matrix = AccuracyMatrix.read(folder / MATRIX)
    page = write_report(folder)
    if given.form == "text":
        print(matrix_table(matrix, lenient=read_lenient(matrix, folder)))
        print(f"report: {page}")
    else:
        print({"csv": matrix_csv, "latex": matrix_latex}[given.form](matrix))
    return 0


def compare_runs(argv: Sequence[str]) -> int:
    """Compare runs of one stream: mean and deviation over seeds, as a table, a page and a plot."""
    parser = CommandParser(prog="mmcl compare", description=main.__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, or names under runs/")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        help="folder of the results (%(default)s)",
    )
    given = parser.parse_args(argv)
    found = compare([run_folder(name) for name in given.runs])
    found.write(given.out)
    print(found.text())
    print(f"plot and page: {given.out}")
    return 0
