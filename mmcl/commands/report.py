"""``mmcl report <run>``: write a run's page again."""

from __future__ import annotations

from collections.abc import Sequence

from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser
from mmcl.metrics import AccuracyMatrix
from mmcl.report import matrix_csv, matrix_latex, matrix_table, write_report


def main(argv: Sequence[str]) -> int:
    """Write report.html of a run, also of a half-done one, and print its table."""
    parser = CommandParser(prog="mmcl report", description=main.__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("--as", dest="form", choices=("text", "csv", "latex"), default="text")
    given = parser.parse_args(argv)
    folder = run_folder(given.run)
    matrix = AccuracyMatrix.read(folder / "matrix.json")
    draw = {"text": matrix_table, "csv": matrix_csv, "latex": matrix_latex}[given.form]
    page = write_report(folder)
    print(draw(matrix))
    if given.form == "text":
        print(f"report: {page}")
    return 0
