"""Metrics that a card asks for by its keys ``shift``, ``knowledge`` and ``ability``.

FUAR: Jang et al. 2022, arXiv:2110.03215. Deltas of abilities: TRACE, Wang et al. 2023,
arXiv:2310.06762. Vertical forgetting: the survey of Shi et al. 2024, arXiv:2404.16789.
A matrix of a card without these keys has none of these metrics. As in ``continual_metrics``,
a[t][i] is the score of task i after task t, x[t] that of an eval-only task, t = 0 before training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from mmcl.core.card import Ability, Knowledge
from mmcl.evaluation.continual_metrics import (
    Metric,
    MetricValue,
    Undefined,
    either_form,
    mean_score,
    score,
)
from mmcl.evaluation.matrix import AccuracyMatrix, Column

_Compute = Callable[[AccuracyMatrix], float]
TIME = ("in-domain (TiC)", "backward (TiC)", "forward (TiC)")
"""Metrics of every run that a card with ``shift: temporal`` shows; TiC-CLIP, arXiv:2310.16226."""
ABILITIES: tuple[Ability, ...] = ("general", "instruction", "safety")


@dataclass(frozen=True)
class StageRow:
    """End of a stage: a run of neighboring tasks of equal ``stage``.

    Args:
        stage: "cpt", "dap" or "cft"; "" for the row before training.
        row: row of the matrix after the stage's last task.
        last_task: name of that task; "" before training.
    """

    stage: str
    row: int
    last_task: str

    @property
    def title(self) -> str:
        """The stage and its last task, such as ``dap (radiology)``."""
        return f"{self.stage} ({self.last_task})" if self.row else "before training"


@dataclass(frozen=True)
class ProbeCell:
    """One probe after one stage, each value with the reason where it has none.

    Args:
        score: x[s].
        loss: x[0] - x[s], positive where the ability was lost.
        relative_loss: (x[0] - x[s]) / x[0].
        retention: x[s] / x[0].
        lenient: x[s] in any form; None if the run has no lenient scores.
        lenient_loss: the loss of lenient scores; None if the run has none.
    """

    score: MetricValue
    loss: MetricValue
    relative_loss: MetricValue
    retention: MetricValue
    lenient: MetricValue | None = None
    lenient_loss: MetricValue | None = None


def stage_rows(matrix: AccuracyMatrix) -> list[StageRow]:
    """List the row before training and the last row of every stage, measured or not.

    Empty if no eval-only task of the matrix has an ability.
    """
    if not probes(matrix):
        return []
    rows = [StageRow("", 0, "")]
    stages = [column.stage or "" for column in matrix.columns[: matrix.tasks]]
    for row, stage in enumerate(stages, start=1):
        if row == len(stages) or stages[row] != stage:
            rows.append(StageRow(stage, row, matrix.names[row - 1]))
    return rows


def probes(matrix: AccuracyMatrix, *abilities: Ability) -> list[int]:
    """List the eval-only tasks of these abilities, default any, as tasks counted from 1."""
    wanted = abilities or ABILITIES
    return [n for n, column in enumerate(matrix.columns, start=1) if column.ability in wanted]


def probe_grid(
    matrix: AccuracyMatrix, lenient: AccuracyMatrix | None = None
) -> list[tuple[StageRow, list[tuple[Column, ProbeCell]]]]:
    """Tabulate every probe after every stage.

    Args:
        matrix: the scores.
        lenient: of the same shape, scores in any form.

    Returns:
        by stage, from before training; inside by probe, in the order of the columns.
    """
    either = None if lenient is None else either_form(matrix, lenient)
    return [
        (
            end,
            [
                (matrix.columns[task - 1], _probe_cell(matrix, either, task, end.row))
                for task in probes(matrix)
            ],
        )
        for end in stage_rows(matrix)
    ]


def _probe_cell(
    matrix: AccuracyMatrix, either: AccuracyMatrix | None, task: int, row: int
) -> ProbeCell:
    def value(name: str, definition: str, of: AccuracyMatrix, compute: _Compute) -> MetricValue:
        return Metric(name, definition, lambda each, _: compute(each), least=0)(of)

    def now(each: AccuracyMatrix) -> float:
        return score(each, row, task)

    lost, loss = partial(_loss, [task], row), "x[0] - x[s], s = the end of a stage"
    relative = partial(_relative_loss, task, row)
    cell = ProbeCell(
        value("score", "x[s]", matrix, now),
        value("loss", loss, matrix, lost),
        value("relative loss", "(x[0] - x[s]) / x[0]", matrix, relative),
        value("retention", "x[s] / x[0]", matrix, partial(_retention, task, row)),
    )
    if either is None:
        return cell
    return replace(
        cell,
        lenient=value("lenient score", "x[s] in any form", either, now),
        lenient_loss=value("lenient loss", f"{loss}, in any form", either, lost),
    )


def _loss(tasks: Sequence[int], row: int, matrix: AccuracyMatrix) -> float:
    return fmean([score(matrix, 0, task) - score(matrix, row, task) for task in tasks])


def _retention(task: int, row: int, matrix: AccuracyMatrix) -> float:
    before = score(matrix, 0, task)
    if before == 0:
        raise Undefined(f"{matrix.names[task - 1]!r} scored 0 before training")
    return score(matrix, row, task) / before


def _relative_loss(task: int, row: int, matrix: AccuracyMatrix) -> float:
    return 1 - _retention(task, row, matrix)


def vertical_forgetting(
    matrix: AccuracyMatrix, end: StageRow, after: int | None = None
) -> MetricValue:
    """Vertical forgetting VF(s): mean loss of the general probes since before training.

    Positive means that general ability was lost.

    Args:
        matrix: the scores.
        end: of the stage, from ``stage_rows``.
        after: number of learned tasks, None for the last row measured.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        general = probes(matrix, "general")
        if not general:
            raise Undefined("no eval-only task has ability 'general'")
        if end.row > last:
            raise Undefined(f"the stage has not ended: {last} of its {end.row} tasks are learned")
        return _loss(general, end.row, matrix)

    definition = f"mean over the general probes of x[0] - x[s], s = {end.row}"
    return Metric(f"vertical forgetting after {end.title}", definition, compute, 0)(matrix, after)


def ability_delta(
    matrix: AccuracyMatrix, ability: Ability, after: int | None = None
) -> MetricValue:
    """Change of an ability since before training (TRACE's delta); negative means that it was lost.

    Args:
        matrix: the scores.
        ability: "general", "instruction" or "safety".
        after: number of learned tasks, None for the last row measured.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        tasks = probes(matrix, ability)
        if not tasks:
            raise Undefined(f"no eval-only task has ability {ability!r}")
        return -_loss(tasks, last, matrix)

    definition = f"mean over the probes of {ability} ability of x[T] - x[0]"
    return Metric(f"{ability} ability delta", definition, compute)(matrix, after)


def fuar(matrix: AccuracyMatrix, after: int | None = None) -> MetricValue:
    """Forgotten / (updated + acquired) ratio, FUAR of continual knowledge learning.

    Below 1, more facts were gained than lost; 0 = nothing was forgotten. The paper defines an
    invariant probe per corpus; here those of the card are probed at every earlier row, row 0
    included. Several probes of one kind count by their mean score.

    Jang et al. 2022, arXiv:2110.03215.

    Args:
        matrix: the scores; eval-only tasks with ``knowledge``.
        after: number n of learned tasks, None for the last row measured.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        known = {kind: _probes_of(matrix, kind) for kind in ("invariant", "updated", "new")}
        if not known["invariant"]:
            raise Undefined("no eval-only task has knowledge 'invariant'")
        gains = [tasks for kind, tasks in known.items() if kind != "invariant" and tasks]
        if not gains:
            raise Undefined("no eval-only task has knowledge 'updated' or 'new'")
        lost = _sum_of_drops(matrix, known["invariant"], last)
        gained = sum(_sum_of_drops(matrix, tasks, last, sign=-1) for tasks in gains)
        if gained == 0:
            raise Undefined("no gain: no updated or new fact scores higher than in an earlier row")
        return lost / gained

    definition = (
        "sum over i < n of max(0, F[i] - F[n]) / sum over i < n of "
        "(max(0, U[n] - U[i]) + max(0, A[n] - A[i])), mean scores in row i of the probes of "
        "invariant (F), updated (U) and new (A) knowledge"
    )
    return Metric("FUAR", definition, compute)(matrix, after)


def _probes_of(matrix: AccuracyMatrix, kind: Knowledge) -> list[int]:
    return [n for n, column in enumerate(matrix.columns, start=1) if column.knowledge == kind]


def _sum_of_drops(matrix: AccuracyMatrix, tasks: Sequence[int], last: int, sign: int = 1) -> float:
    means = [mean_score(matrix, [(row, task) for task in tasks]) for row in range(last + 1)]
    return sum(max(0.0, sign * (earlier - means[last])) for earlier in means[:last])


def forward_transfer_of(matrix: AccuracyMatrix, task: int, after: int | None = None) -> MetricValue:
    """Forward transfer to one task: its score just before it is learned minus zero-shot.

    Args:
        matrix: the scores.
        task: which task, from 2.
        after: number of learned tasks, None for the last row measured.
    """

    def compute(matrix: AccuracyMatrix, last: int) -> float:
        if task > last:
            raise Undefined(f"task {task} is not learned yet")
        return score(matrix, task - 1, task) - score(matrix, 0, task)

    name, definition = f"forward transfer of {matrix.names[task - 1]}", "a[i-1][i] - a[0][i]"
    return Metric(name, f"{definition}, i = {task}", compute, least=0)(matrix, after)


def compute_declared_metrics(
    matrix: AccuracyMatrix, lenient: AccuracyMatrix | None = None, after: int | None = None
) -> list[MetricValue]:
    """Compute the metrics that the card declares, none for a card without the keys.

    Args:
        matrix: the scores.
        lenient: of the same shape, scores in any form; adds lenient vertical forgetting.
        after: number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    found = []
    if matrix.shift == "language":
        found += [forward_transfer_of(matrix, n, after) for n in range(2, matrix.tasks + 1)]
    if any(column.knowledge for column in matrix.columns):
        found.append(fuar(matrix, after))
    ends = stage_rows(matrix)[1:]
    found += [vertical_forgetting(matrix, end, after) for end in ends]
    found += [ability_delta(matrix, each, after) for each in ABILITIES if probes(matrix, each)]
    if lenient is not None and ends:
        either = either_form(matrix, lenient)
        last = (matrix.last_row or 0) if after is None else after
        for each in (vertical_forgetting(either, end, last) for end in ends):
            name, definition = f"lenient {each.name}", f"{each.definition}, in any form"
            found.append(MetricValue(name, each.value, definition, each.reason))
    return found


def declared_names(matrix: AccuracyMatrix) -> list[str]:
    """Name the metrics of a declared shift, of knowledge and of abilities, without lenient ones.

    The forward transfer of single tasks is left out.
    """
    names = list(TIME) if matrix.shift == "temporal" else []
    known = [each.name for each in compute_declared_metrics(matrix)]
    return names + [name for name in known if not name.startswith("forward transfer of ")]
