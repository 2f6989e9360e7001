"""Anticipatory recovery on a cyclic stream: does the loss fall before a task is trained again?

Yang et al. 2024, arXiv:2403.09613.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmcl.core import TaskStream
from mmcl.diagnostics.task_loss import ProbeData, finite_or_none, mean_or_none, measure_task
from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.diagnostic_record import Diagnostic, Panel, Series
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.lightning.module import ContinualModule

_TEXT = (
    "Loss on every task after every task of a cyclic stream. Where it falls before the task is "
    "trained again, the model recovers what it forgot in anticipation (Yang et al. 2024, "
    "arXiv:2403.09613)."
)
_INDEX = (
    "(L_peak - L_before) / L_peak: L_peak is the highest loss since the task was last trained, "
    "L_before the loss just before it is trained again"
)
_SHARE = (
    "(L_peak - L_before) / (L_peak - L_trained): share of the forgetting that is recovered before "
    "the task is trained again; L_trained is the loss when it was last trained"
)


def recovery_index(losses: Sequence[float | None]) -> tuple[float, float | None]:
    """Return the recovery index of a task, and the share of its forgetting that is recovered.

    Args:
        losses: on the task: when it was just trained, then after each other task, until just before
            it is trained again; None = not measured.

    Returns:
        (L_peak - L_before) / L_peak, 0 to 1, and (L_peak - L_before) / (L_peak - L_trained), None
        if nothing was forgotten.

    Raises:
        ValueError: if no other task was trained in between, a loss is missing, not finite or
            negative, or all are 0.
    """
    if len(losses) < 3:
        raise ValueError("a curve needs two other tasks before the task is trained again")
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        raise ValueError(f"{len(losses) - len(known)} of {len(losses)} losses are not measured")
    if not all(math.isfinite(loss) and loss >= 0 for loss in known):
        raise ValueError("a loss is negative or not finite")
    peak, before, trained = max(known), known[-1], known[0]
    if peak == 0:
        raise ValueError("every loss is 0")
    share = (peak - before) / (peak - trained) if peak > trained else None
    return (peak - before) / peak, share


def repetitions(stream: TaskStream) -> list[tuple[int, int, int]]:
    """Return (task, row when it was last trained, row before it is trained again) of a stream."""
    last: dict[int, int] = {}
    found = []
    for task in stream:
        first = stream.first_occurrence(task.index)
        if first in last:
            found.append((first, last[first] + 1, task.index))
        last[first] = task.index
    return found


def recovery(
    load: Callable[[int], ContinualModule | None],
    probes: ProbeData,
    rows: Sequence[int],
    matrix: AccuracyMatrix | None = None,
    numbers: Sequence[int] | None = None,
) -> Diagnostic:
    """Measure the loss on every task after every task of a cyclic stream, and what is recovered.

    Args:
        load: row -> the module after so many tasks, on the device of ``probes``; None = lost.
        probes: of the run's stream, which repeats its tasks.
        rows: numbers of learned tasks; an index needs all rows of its cycle.
        matrix: of the run; its scores are drawn beside the losses.
        numbers: tasks to measure; None = all.

    Raises:
        ValueError: if the stream repeats no task.
    """
    stream = _expect_cyclic(probes.data.stream)
    firsts = [task.index for task in stream if task.repeat_of is None]
    numbers = firsts if numbers is None else numbers
    names = ("zero-shot", *(task.name for task in stream))
    losses, lost = _losses(load, probes, rows, numbers)
    notes = [f"The checkpoint after '{names[row]}' is lost, so it is left out." for row in lost]
    curves = [Series(probes.name(n), [losses.get((r, n)) for r in rows]) for n in numbers]
    panels = [Panel("loss", curves)]
    if matrix is not None:
        cells = [
            Series(
                probes.name(n), [matrix.get(r, n) if r < len(matrix.rows) else None for r in rows]
            )
            for n in numbers
        ]
        panels.append(Panel("score of the run", cells, is_score=True))
    return Diagnostic(
        "recovery",
        "Anticipatory recovery",
        _TEXT,
        "after",
        list(range(len(rows))),
        panels,
        x_names=[names[row] for row in rows],
        metrics=_metrics(stream, losses, numbers),
        notes=notes,
        settings={"samples": str(probes.samples or "all")},
    )


def _expect_cyclic(stream: TaskStream) -> TaskStream:
    if not any(task.repeat_of is not None for task in stream):
        raise ValueError(
            f"the stream '{stream.name}' trains every task once, and recovery needs a cyclic one: "
            "train a run with data.repeats 2 or more"
        )
    return stream


def _losses(
    load: Callable[[int], ContinualModule | None],
    probes: ProbeData,
    rows: Sequence[int],
    numbers: Sequence[int],
) -> tuple[dict[tuple[int, int], float | None], list[int]]:
    """Return the loss of every (row, task), and the rows whose checkpoint is lost."""
    losses: dict[tuple[int, int], float | None] = {}
    lost = []
    for row in rows:
        module = load(row)
        if module is None:
            lost.append(row)
            continue
        for number in numbers:
            losses[row, number] = finite_or_none(measure_task(module, probes, row, number).loss)
    return losses, lost


def _metrics(
    stream: TaskStream, losses: Mapping[tuple[int, int], float | None], numbers: Sequence[int]
) -> list[MetricValue]:
    each: list[MetricValue] = []
    indices: list[float | None] = []
    shares: list[float | None] = []
    for number, trained, before in repetitions(stream):
        if number not in numbers:
            continue
        name = f"before '{stream[before].name}'"
        try:
            index, share = recovery_index(
                [losses.get((row, number)) for row in range(trained, before + 1)]
            )
        except ValueError as error:
            each.append(MetricValue(f"recovery index {name}", None, _INDEX, str(error)))
            continue
        indices.append(index)
        each.append(MetricValue(f"recovery index {name}", index, _INDEX))
        gap = "nothing was forgotten" if share is None else None
        each.append(MetricValue(f"recovered share {name}", share, _SHARE, gap))
        shares += [] if share is None else [share]
    means = [("mean recovery index", indices, _INDEX), ("mean recovered share", shares, _SHARE)]
    gap = "there is no repetition for which it is defined"
    return [
        MetricValue(name, mean, definition, gap if mean is None else None)
        for name, values, definition in means
        for mean in [mean_or_none(values)]
    ] + each
