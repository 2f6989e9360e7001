"""A run as text: a table for the terminal, CSV for a sheet, LaTeX for a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mmcl.metrics.figures import MAIN, Figure, all_figures
from mmcl.metrics.leniency import lenient_figures
from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.report.words import clean, percent, points

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
    figures: Sequence[Figure] | None = None,
    *,
    lenient: AccuracyMatrix | None = None,
    width: int = 100,
    is_coloured: bool = False,
) -> str:
    """Draw the matrix in percent, the task just learned in brackets, the main figures below.

    Columns are numbered; the row names say which task has which number, probes are listed, and so
    are scores other than accuracy. A matrix wider than ``width`` is drawn in several blocks.

    Args:
        matrix: the scores.
        figures: what the last line shows, default the main figures of the matrix.
        lenient: scores in any form; what they come to is shown below the figures.
        width: characters of a line, at least 40.
        is_coloured: add terminal colours.

    Returns:
        the text, to be printed by the caller; it ends without a newline.
    """
    width = max(width, 40)
    title = max(len(_row_title(matrix, row)) for row in range(len(matrix.rows)))
    at_once = max(1, (width - min(title, width // 2) - 4) // _CELL)
    starts = range(0, len(matrix.columns), at_once)
    blocks: list[RenderableType] = [
        _block(matrix, range(start, min(start + at_once, len(matrix.columns)))) for start in starts
    ]
    probes = enumerate(matrix.names[matrix.tasks :], 1)
    notes = [f"probe p{number} = {clean(name)}" for number, name in probes]
    notes += _score_notes(matrix)
    lines = [Text(figure_line(_main(all_figures(matrix) if figures is None else figures)), "bold")]
    if lenient is not None:
        lines.append(Text(figure_line(lenient_figures(matrix, lenient))))
    return _render([*blocks, *map(Text, notes), *lines], width, is_coloured)


def figure_line(figures: Iterable[Figure]) -> str:
    """Write figures on one line in percent points, undefined ones as a dot."""
    return "   ".join(f"{clean(each.name)} {_shown(each)}" for each in figures)


def matrix_csv(matrix: AccuracyMatrix) -> str:
    """Write the matrix as CSV: first line the columns, then a line per row, empty = not measured.

    Scores keep all their digits. A name that a sheet would run as a formula gets a quote in front.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after", *map(harmless, matrix.names)])
    for name, row in zip(matrix.rows, matrix.values, strict=True):
        writer.writerow([harmless(name), *("" if v is None else repr(v) for v in row)])
    return text.getvalue()


def matrix_latex(matrix: AccuracyMatrix) -> str:
    """Write the matrix as a LaTeX ``tabular`` in percent (needs booktabs), just learned in bold."""
    heads = [latex(name) for name in matrix.names]
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(matrix.columns)}}}",
        r"\toprule",
        f"After & {' & '.join(heads)} \\\\",
        r"\midrule",
    ]
    for row, name in enumerate(matrix.rows):
        cells = [_latex_cell(matrix, row, column) for column in range(len(matrix.columns))]
        lines.append(f"{latex(name)} & {' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex(text: str) -> str:
    """Escape what LaTeX would read as a command."""
    return "".join(_LATEX.get(letter, letter) for letter in clean(text))


def harmless(name: str) -> str:
    """Keep a spreadsheet from running a name as a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name


def render(table: Table, width: int, is_coloured: bool) -> str:
    """Draw one table as text."""
    return _render([table], width, is_coloured)


def _block(matrix: AccuracyMatrix, columns: range) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("after, %", no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(_column_title(matrix, column), justify="right")
    for row in range(len(matrix.rows)):
        cells = [_cell(matrix, row, column) for column in columns]
        table.add_row(Text(_row_title(matrix, row)), *cells)
    return table


def _score_notes(matrix: AccuracyMatrix) -> list[str]:
    """Say what the columns measure where that is not the accuracy of classes alone."""
    columns: dict[str, list[str]] = {}
    for place, column in enumerate(matrix.columns):
        columns.setdefault(column.score, []).append(_column_title(matrix, place))
    if columns.keys() == {"accuracy"}:
        return []
    if len(columns) == 1:
        return [f"score {clean(matrix.columns[0].score)}"]
    return [f"score {clean(name)}: column {', '.join(own)}" for name, own in columns.items()]


def _column_title(matrix: AccuracyMatrix, column: int) -> str:
    probe = column - matrix.tasks + 1
    return str(column + 1) if probe < 1 else f"p{probe}"


def _row_title(matrix: AccuracyMatrix, row: int) -> str:
    return f"{row} {clean(matrix.rows[row])}"


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


def _main(figures: Sequence[Figure]) -> list[Figure]:
    named = {each.name: each for each in figures}
    return [named[name] for name in MAIN if name in named]


def _shown(figure: Figure) -> str:
    return UNMEASURED if figure.value is None else points(figure.name, figure.value)


def _render(parts: Sequence[RenderableType], width: int, is_coloured: bool) -> str:
    text = io.StringIO()
    console = Console(
        file=text,
        width=width,
        force_terminal=is_coloured,
        color_system="standard" if is_coloured else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n"))
