"""Several runs side by side: mean and deviation over seeds, as table, figure, CSV and LaTeX."""

from __future__ import annotations

import base64
import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mmcl.core.atomic import write_atomic
from mmcl.metrics.figures import MAIN, average_accuracy
from mmcl.metrics.leniency import LENIENT_MAIN
from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.metrics.summary import RunSummary
from mmcl.report.html import render_template
from mmcl.report.spreadplot import Curve, spread_figure
from mmcl.report.tables import UNMEASURED, harmless, latex, render
from mmcl.report.words import clean, points, unit

_SEED_AT_END = re.compile(r"[-_.]?(?:seed|s)[-_=]?\d+$", re.IGNORECASE)


@dataclass(frozen=True)
class Spread:
    """One figure over the seeds of a group.

    Args:
        name: of the figure.
        values: one per seed, in order of the seeds; empty if a seed has no value.
        reason: why there are no values.
    """

    name: str
    values: tuple[float, ...]
    reason: str | None = None

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (divisor n - 1), None below two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def words(self) -> str:
        """Mean and deviation in the unit of ``points``, a dot without values."""
        if self.mean is None:
            return UNMEASURED
        if self.deviation is None:
            return points(self.name, self.mean)
        return f"{points(self.name, self.mean)} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Args:
        label: strategy and the runs' name without the seed.
        seeds: of the runs, ascending.
        spreads: one per figure that is compared.
        curve: per row from 1, average accuracy of each seed; rows that a seed lacks are empty.
    """

    label: str
    seeds: tuple[int, ...]
    spreads: tuple[Spread, ...]
    curve: Curve


@dataclass(frozen=True)
class Comparison:
    """Groups of runs over one stream.

    Args:
        stream: its name.
        scenario: task, class or domain.
        groups: best average accuracy first.
        rows: names of the rows after training began.
        notes: what was left out, a sentence each.
    """

    stream: str
    scenario: str
    groups: tuple[Group, ...]
    rows: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the figures: the main ones, and the lenient average where answers have one."""
        return tuple(spread.name for spread in self.groups[0].spreads)

    def text(self, width: int = 100, *, is_coloured: bool = False) -> str:
        """Draw the table for a terminal of at least 100 characters, 112 with a lenient average."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        table.add_column(
            f"{clean(self.stream)} ({self.scenario})", overflow="fold", vertical="bottom"
        )
        table.add_column("seeds", justify="right")
        for name in self.names:
            head = f"{name}, {unit(name)}".replace(" ", "\n")
            table.add_column(head, justify="right", no_wrap=True, vertical="bottom")
        for group in self.groups:
            words = [Text(spread.words) for spread in group.spreads]
            table.add_row(Text(clean(group.label)), str(len(group.seeds)), *words)
        least = 100 + 12 * (len(self.names) - len(MAIN))
        return "\n".join([render(table, max(width, least), is_coloured), *map(clean, self.notes)])

    def csv(self) -> str:
        """Write mean, deviation and number of seeds of every figure, all digits, as CSV."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        heads = [f"{name} {what}" for name in self.names for what in ("mean", "deviation")]
        writer.writerow(["run", "seeds", *heads])
        for group in self.groups:
            numbers = [n for spread in group.spreads for n in (spread.mean, spread.deviation)]
            cells = ["" if number is None else repr(number) for number in numbers]
            writer.writerow([harmless(group.label), len(group.seeds), *cells])
        return text.getvalue()

    def latex(self) -> str:
        """Write the table as a LaTeX ``tabular`` (needs booktabs)."""
        lines = [rf"\begin{{tabular}}{{l{'r' * len(self.names)}}}", r"\toprule"]
        lines += [f"Run & {' & '.join(self.names)} \\\\", r"\midrule"]
        for group in self.groups:
            cells = [
                "--" if spread.mean is None else f"${spread.words.replace('±', chr(92) + 'pm')}$"
                for spread in group.spreads
            ]
            lines.append(f"{latex(group.label)} & {' & '.join(cells)} \\\\")
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])

    def figure(self) -> bytes:
        """Draw average accuracy over training and the main figures with their spread, as PNG."""
        curves = [(group.label, group.curve) for group in self.groups]
        bars = {
            name: [group.spreads[place].values for group in self.groups]
            for place, name in enumerate(self.names)
        }
        return spread_figure(curves, bars, self.rows)

    def write(self, folder: Path) -> Path:
        """Write comparison.html, .png, .csv and .tex.

        Returns:
            path of the page.
        """
        picture = self.figure()
        source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
        values = {"comparison": self, "names": self.names, "source": source}
        write_atomic(folder / "comparison.png", picture)
        write_atomic(folder / "comparison.csv", self.csv().encode("utf-8", "replace"))
        write_atomic(folder / "comparison.tex", self.latex().encode("utf-8", "replace"))
        page = folder / "comparison.html"
        write_atomic(page, render_template("compare.html.j2", values))
        return page


@dataclass(frozen=True)
class _Run:
    folder: Path
    summary: RunSummary
    matrix: AccuracyMatrix


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare finished runs of one stream, runs that differ only in the seed together.

    Runs belong together if strategy, model and name are equal, the name without a seed at its end
    (``er-seed3``, ``er_s3``, or ``er-3`` where 3 is the run's seed). Unfinished runs are left out
    and named in the notes.

    Args:
        runs: their folders.

    Raises:
        FileNotFoundError: if a folder lacks summary.json or matrix.json.
        ValueError: if the streams differ, no run is finished, or a group has a seed twice.
    """
    read = [_read(folder) for folder in runs]
    finished = [run for run in read if run.summary.finished]
    if not finished:
        raise ValueError(f"compare got {len(read)} runs, none finished: give at least one that is")
    for run in finished[1:]:
        _refuse_other_stream(finished[0], run)
    together: dict[tuple[str, str, str], list[_Run]] = {}
    for run in finished:
        key = (run.summary.strategy, run.summary.model, _stem(run.summary))
        together.setdefault(key, []).append(run)
    labels = _labels(list(together))
    has_forms = any(run.summary.figure(LENIENT_MAIN) for run in finished)
    names = (*MAIN, LENIENT_MAIN) if has_forms else MAIN
    groups = [
        _group(label, members, names)
        for label, members in zip(labels, together.values(), strict=True)
    ]
    groups.sort(key=lambda group: -(group.spreads[0].mean or 0.0))
    first = finished[0].matrix
    left_out = [run for run in read if not run.summary.finished]
    notes = [f"left out, not finished: {run.folder}" for run in left_out]
    return Comparison(first.stream, first.scenario, tuple(groups), first.rows[1:], tuple(notes))


def _read(folder: Path) -> _Run:
    summary = RunSummary.read(folder / "summary.json")
    return _Run(folder, summary, AccuracyMatrix.read(folder / "matrix.json"))


def _refuse_other_stream(first: _Run, other: _Run) -> None:
    for what in ("stream", "scenario", "tasks", "columns"):
        mine, theirs = getattr(first.matrix, what), getattr(other.matrix, what)
        if mine == theirs:
            continue
        if what == "columns":
            pairs = zip(mine, theirs, strict=False)
            mine, theirs = next((p for p in pairs if p[0] != p[1]), (len(mine), len(theirs)))
        raise ValueError(
            f"runs differ in {what}: {first.folder} has {mine!r}, {other.folder} has {theirs!r}; "
            f"compare runs of one stream"
        )


def _stem(summary: RunSummary) -> str:
    cut = _SEED_AT_END.sub("", summary.name)
    if cut == summary.name:
        cut = re.sub(rf"[-_.]{summary.seed}$", "", summary.name)
    return cut or summary.name


def _labels(keys: list[tuple[str, str, str]]) -> list[str]:
    """Name groups by the strategy, and by model and name as far as that tells them apart."""
    shown = [0]
    for place in (1, 2):
        told_apart = {tuple(key[each] for each in shown) for key in keys}
        varies = len({key[place] for key in keys}) > 1
        if varies and len(told_apart) < len(keys):
            shown.append(place)
    return [" · ".join(key[place] for place in shown) for key in keys]


def _group(label: str, members: list[_Run], names: Sequence[str]) -> Group:
    members.sort(key=lambda run: run.summary.seed)
    for one, two in zip(members, members[1:], strict=False):
        if one.summary.seed == two.summary.seed:
            raise ValueError(
                f"{one.folder} and {two.folder} are both {label!r} with seed {one.summary.seed}: "
                f"give one of them, or runs of other seeds"
            )
    seeds = tuple(run.summary.seed for run in members)
    spreads = tuple(_spread(name, members) for name in names)
    return Group(label, seeds, spreads, _curve(members))


def _spread(name: str, members: list[_Run]) -> Spread:
    figures = [run.summary.figure(name) for run in members]
    values = [figure.value for figure in figures if figure and figure.value is not None]
    if len(values) == len(members):
        return Spread(name, tuple(values))
    reasons = [figure.reason for figure in figures if figure and figure.reason]
    return Spread(name, (), reasons[0] if reasons else f"a run has no figure {name!r}")


def _curve(members: list[_Run]) -> Curve:
    curve = []
    for row in range(1, members[0].matrix.tasks + 1):
        values = [average_accuracy(run.matrix, row).value for run in members]
        known = [value for value in values if value is not None]
        curve.append(tuple(known) if len(known) == len(values) else ())
    return curve
