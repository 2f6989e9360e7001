"""``mmcl report <run>``: write a run's page again."""

from __future__ import annotations

from collections.abc import Sequence

from mmcl.commands.sequence import run_folder
from mmcl.commands.words import CommandParser
from mmcl.metrics import AccuracyMatrix
from mmcl.metrics.leniency import read_lenient
from mmcl.report import matrix_csv, matrix_latex, matrix_table, write_report


def main(argv: Sequence[str]) -> int:
    """Write report.html of a run, also of a half-done one, and print its table."""
    parser = CommandParser(prog="mmcl report", description=main.__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("--as", dest="form", choices=("text", "csv", "latex"), default="text")
    given = parser.parse_args(argv)
    folder = run_folder(given.run)
    matrix = AccuracyMatrix.read(folder / "matrix.json")
    page = write_report(folder)
    if given.form == "text":
        print(matrix_table(matrix, lenient=read_lenient(matrix, folder)))
        print(f"report: {page}")
    else:
        print({"csv": matrix_csv, "latex": matrix_latex}[given.form](matrix))
    return 0
