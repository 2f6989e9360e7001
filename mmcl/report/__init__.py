"""Report of a run: tables, plots, one HTML page, and the comparison of runs."""

from mmcl.report.compare import Comparison, compare
from mmcl.report.page import write_report
from mmcl.report.tables import (
    matrix_csv,
    matrix_latex,
    matrix_table,
    metric_line,
    retrieval_table,
)

__all__ = [
    "Comparison", "compare", "matrix_csv", "matrix_latex", "matrix_table", "metric_line",
    "retrieval_table", "write_report",
]  # fmt: skip
