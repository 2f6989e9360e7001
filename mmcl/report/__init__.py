"""From numbers to something a person looks at: tables, plots, one HTML page."""

from mmcl.report.compare import Comparison, compare
from mmcl.report.page import write_report
from mmcl.report.rundir import RunDirectory, Sample
from mmcl.report.tables import figure_line, matrix_csv, matrix_latex, matrix_table

__all__ = [
    "Comparison",
    "RunDirectory",
    "Sample",
    "compare",
    "figure_line",
    "matrix_csv",
    "matrix_latex",
    "matrix_table",
    "write_report",
]
