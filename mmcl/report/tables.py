"""Tables of a run: text for the terminal, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mmcl.evaluation.class_metrics import ClassMetrics, ConfusionMatrix
from mmcl.evaluation.continual_metrics import (
    MAIN,
    MetricValue,
    compute_all_metrics,
    compute_lenient_metrics,
)
from mmcl.evaluation.declared_metrics import (
    TIME,
    compute_declared_metrics,
    probe_grid,
)
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.retrieval import KS, RetrievalScores
from mmcl.report.formatting import format_metric, percent, sanitize

UNMEASURED = "·"
_CELL = 7
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "·": r"$\cdot$",
}


def matrix_table(
    matrix: AccuracyMatrix,
    metrics: Sequence[MetricValue] | None = None,
    *,
    lenient: AccuracyMatrix | None = None,
    width: int = 100,
    is_colored: bool = False,
) -> str:
    """Draw the accuracy matrix in percent, the task just learned in brackets, main metrics below.

    Columns are numbered like the rows; eval-only tasks and scores other than accuracy are listed
    below. A matrix wider than ``width`` is drawn in several blocks.

    Args:
        matrix: the scores.
        metrics: metrics of the last line, default the main metrics of the matrix.
        lenient: scores in any form; their metrics are shown below the main ones.
        width: characters of a line, at least 40.
        is_colored: add terminal colors.

    Returns:
        the text, without a final newline.
    """
    width = max(width, 40)
    title = max(len(_row_title(matrix, row)) for row in range(len(matrix.rows)))
    at_once = max(1, (width - min(title, width // 2) - 4) // _CELL)
    starts = range(0, len(matrix.columns), at_once)
    blocks: list[RenderableType] = [
        _block(matrix, range(start, min(start + at_once, len(matrix.columns)))) for start in starts
    ]
    eval_only = enumerate(matrix.names[matrix.tasks :], 1)
    notes = [f"eval-only task e{number} = {sanitize(name)}" for number, name in eval_only]
    notes += _score_notes(matrix)
    known = compute_all_metrics(matrix) if metrics is None else metrics
    named = {each.name: each for each in known}
    lines = [Text(metric_line([named[name] for name in MAIN if name in named]), "bold")]
    if lenient is not None:
        lines.append(Text(metric_line(compute_lenient_metrics(matrix, lenient))))
    declared = [each for each in known if matrix.shift == "temporal" and each.name in TIME]
    declared += compute_declared_metrics(matrix, lenient)
    lines += [
        Text(metric_line([each]) + (f" ({sanitize(each.reason)})" if each.reason else ""))
        for each in declared
    ]
    blocks += _probe_tables(matrix, lenient)
    return render([*blocks, *map(Text, notes), *lines], width, is_colored)


def metric_line(metrics: Iterable[MetricValue]) -> str:
    """Format metrics on one line, undefined ones as a dot."""
    return "   ".join(f"{sanitize(each.name)} {_format(each)}" for each in metrics)


def matrix_csv(matrix: AccuracyMatrix) -> str:
    """Write the matrix as CSV: first line the columns, then a line per row, empty = not measured.

    Scores keep all digits. A name that a spreadsheet would run as a formula gets a quote in front.
    """
    rows = zip(matrix.rows, matrix.values, strict=True)
    return csv_text(["after", *matrix.names], [[name, *values] for name, values in rows])


def matrix_latex(matrix: AccuracyMatrix) -> str:
    """Write the matrix as a LaTeX ``tabular`` in percent (needs booktabs), just learned in bold."""
    columns = range(len(matrix.columns))
    rows = [
        [latex(name), *(_latex_cell(matrix, row, column) for column in columns)]
        for row, name in enumerate(matrix.rows)
    ]
    return latex_table(["After", *map(latex, matrix.names)], rows)


def retrieval_table(scores: Sequence[RetrievalScores], *, width: int = 100) -> str:
    """Draw the recalls of the last row that has captions, in percent, both ways.

    Args:
        scores: by row and column; not empty.
        width: characters of a line, at least 80.

    Returns:
        the text, without a final newline.
    """
    after = scores[-1].after
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("task", no_wrap=True, overflow="ellipsis")
    for name in ("images", "texts", *(f"{way} R@{k}" for way in ("i2t", "t2i") for k in KS)):
        table.add_column(name, justify="right")
    for each in scores:
        if each.after == after:
            recalls = [percent(value) for value in _recalls(each)]
            table.add_row(Text(sanitize(each.task)), str(each.images), str(each.texts), *recalls)
    title = Text(f"retrieval after {sanitize(after)}, %")
    return render([title, table], max(width, 80), is_colored=False)


def retrieval_csv(scores: Sequence[RetrievalScores]) -> str:
    """Write the recalls of every cell of captions as CSV: a line for each, with all digits."""
    ways = [f"{way} R@{k}" for way in ("image to text", "text to image") for k in KS]
    rows: list[list[str | float | None]] = [
        [each.after, each.task, each.images, each.texts, *_recalls(each)] for each in scores
    ]
    return csv_text(["after", "task", "images", "texts", *ways], rows)


def _recalls(scores: RetrievalScores) -> list[float]:
    ways = (scores.image_to_text, scores.text_to_image)
    return [way[str(k)] for way in ways for k in KS]


def classes_csv(classes: Sequence[ClassMetrics]) -> str:
    """Write the metrics of every class as CSV, undefined ones empty with the reasons last.

    Scores are fractions with all digits. Tasks of a class are separated by semicolons, and so are
    reasons.
    """
    if not classes:
        raise ValueError("there are no classes to write: give those of a classification task")
    rows: list[list[str | float | None]] = []
    for each in classes:
        metrics = (*each.accuracies, each.learning, each.final, each.forgetting)
        most = each.confused_with[0] if each.confused_with else (None, None)
        values = [metric.value for metric in metrics]
        reasons = "; ".join(each.reasons) or None
        rows.append([each.name, "; ".join(each.tasks), each.samples, *values, *most, reasons])
    titles = [metric.name for metric in classes[0].accuracies]
    titles += ["accuracy after learning", "final accuracy", "forgetting"]
    titles += ["most confused with", "confused samples", "undefined because"]
    return csv_text(["class", "tasks", "test samples", *titles], rows)


def confusion_csv(confusion: ConfusionMatrix, after: str) -> str:
    """Write a confusion matrix as CSV: a line per class, its test samples by predicted class.

    Args:
        confusion: K classes, K x K cells are written.
        after: name of the last task learned, for the first cell.
    """
    named = zip(confusion.classes, confusion.rows, strict=True)
    head = [f"target, predicted after {after}", *confusion.classes]
    return csv_text(head, [[name, *counts] for name, counts in named])


def csv_text(head: Sequence[str], rows: Iterable[Sequence[str | float | None]]) -> str:
    """Write a CSV table: numbers with all digits, None empty, names safe for spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (head, *rows):
        writer.writerow([escape_formula(cell) if isinstance(cell, str) else cell for cell in row])
    return text.getvalue()


def latex_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a LaTeX ``tabular`` (needs booktabs), names left, numbers right."""
    first, *others = [f"{' & '.join(cells)} \\\\" for cells in (head, *rows)]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    end = [r"\bottomrule", r"\end{tabular}", ""]
    return "\n".join([begin, r"\toprule", first, r"\midrule", *others, *end])


def latex(text: str) -> str:
    """Escape LaTeX special characters."""
    return "".join(_LATEX.get(letter, letter) for letter in sanitize(text))


def escape_formula(name: str) -> str:
    """Quote a name that a spreadsheet would run as a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name


def _block(matrix: AccuracyMatrix, columns: range) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("after, %", no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(_column_title(matrix, column), justify="right")
    for row in range(len(matrix.rows)):
        cells = [_cell(matrix, row, column) for column in columns]
        table.add_row(Text(_row_title(matrix, row)), *cells)
    return table


def _probe_tables(matrix: AccuracyMatrix, lenient: AccuracyMatrix | None) -> list[Table]:
    """Draw the probes after every stage: score, loss and, if known, the lenient score."""
    grid = probe_grid(matrix, lenient)
    if not grid:
        return []
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("after stage, score (loss), %", no_wrap=True, overflow="ellipsis")
    for column, _ in grid[0][1]:
        table.add_column(f"{sanitize(column.name)}\n{column.ability}", justify="right")
    for end, cells in grid:
        shown = []
        for _, cell in cells:
            loss = "" if end.row == 0 else f" ({_format(cell.loss)})"
            form = "" if cell.lenient is None else f" ~{_format(cell.lenient)}"
            shown.append(f"{_format(cell.score)}{form}{loss}")
        table.add_row(Text(sanitize(end.title)), *map(Text, shown))
    return [table]


def _score_notes(matrix: AccuracyMatrix) -> list[str]:
    """Name the scores of the columns, unless all are the accuracy of classes."""
    columns: dict[str, list[str]] = {}
    for index, column in enumerate(matrix.columns):
        columns.setdefault(column.score, []).append(_column_title(matrix, index))
    if columns.keys() == {"accuracy"}:
        return []
    if len(columns) == 1:
        return [f"score {sanitize(matrix.columns[0].score)}"]
    return [f"score {sanitize(name)}: column {', '.join(own)}" for name, own in columns.items()]


def _column_title(matrix: AccuracyMatrix, column: int) -> str:
    eval_only = column - matrix.tasks + 1
    return str(column + 1) if eval_only < 1 else f"e{eval_only}"


def _row_title(matrix: AccuracyMatrix, row: int) -> str:
    return f"{row} {sanitize(matrix.rows[row])}"


def _cell(matrix: AccuracyMatrix, row: int, column: int) -> Text:
    value = matrix.get(row, column)
    if value is None:
        return Text(f"{UNMEASURED} ", style="dim")
    if row == column + 1 and column < matrix.tasks:
        return Text(f"[{percent(value)}]", style="bold")
    return Text(f"{percent(value)} ", style="" if row > column else "dim")


def _latex_cell(matrix: AccuracyMatrix, row: int, column: int) -> str:
    value = matrix.get(row, column)
    if value is None:
        return "--"
    is_learned = row == column + 1 and column < matrix.tasks
    return rf"\textbf{{{percent(value)}}}" if is_learned else percent(value)


def _format(metric: MetricValue) -> str:
    return UNMEASURED if metric.value is None else format_metric(metric.name, metric.value)


def render(parts: Sequence[RenderableType], width: int, is_colored: bool) -> str:
    """Draw tables and texts, one below the other, without trailing spaces."""
    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        force_terminal=is_colored,
        color_system="standard" if is_colored else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
