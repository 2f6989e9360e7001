"""Linear mode connectivity: loss and score on the straight line between two checkpoints.

theta(mu) = (1 - mu) A + mu B; Frankle et al. 2020, arXiv:1912.05671; Mirzadeh et al. 2021,
arXiv:2010.04495, for checkpoints of one continual run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mmcl.diagnostics.interpolated_weights import (
    copy_weights,
    different_weights,
    merged_weights,
    write_weights,
)
from mmcl.diagnostics.task_loss import (
    Measured,
    ProbeData,
    finite_or_none,
    mean_or_none,
    measure_task,
)
from mmcl.evaluation.continual_metrics import MetricValue
from mmcl.evaluation.diagnostic_record import Diagnostic, Panel, Series
from mmcl.lightning.module import ContinualModule
from mmcl.ops.weight_interpolation import interpolate

THRESHOLD = 0.02
"""Barrier up to which two checkpoints count as connected, as a fraction of the loss at the start.

It is a choice of this package; the papers state none.
"""
_BARRIER = "max over mu of L(mu) - ((1 - mu) L(0) + mu L(1))"
_TOLERANCE = 1e-3
T = TypeVar("T")


def evenly_spaced_points(points: int) -> list[float]:
    """Return ``points`` evenly spaced positions from 0 to 1.

    Raises:
        ValueError: if there are fewer than 3, as a barrier lies between the ends.
    """
    if points < 3:
        raise ValueError(f"points is {points}: give 3 or more, both ends included")
    return [index / (points - 1) for index in range(points)]


def measure_line(
    measure: Callable[[Mapping[str, Tensor]], T],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    positions: Sequence[float],
) -> list[T]:
    """Measure something on the straight line between two sets of weights.

    Args:
        measure: of weights by name.
        start: name -> weights at position 0.
        end: weights of the same names and shapes at position 1.
        positions: mu of each point, 0 to 1; both ends are exact.

    Returns:
        the measured value of each position.
    """
    return [measure(interpolate(start, end, mu)) for mu in positions]


def loss_barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    """Return the loss barrier, max over mu of L(mu) - ((1 - mu) L(0) + mu L(1)).

    It is 0 or more, because it is 0 at both ends.

    Args:
        positions: mu of each point, from 0 to 1, ascending.
        losses: L(mu) of each.

    Raises:
        ValueError: if the ends are missing, or a loss is not finite.
    """
    if len(positions) != len(losses) or len(positions) < 2:
        raise ValueError(f"{len(positions)} positions and {len(losses)} losses: give 2 or more")
    if positions[0] != 0 or positions[-1] != 1:
        raise ValueError(f"positions go from {positions[0]} to {positions[-1]}: give 0 to 1")
    for mu, loss in zip(positions, losses, strict=True):
        if not math.isfinite(loss):
            raise ValueError(f"the loss at mu = {mu:g} is {loss}")
    first, last = losses[0], losses[-1]
    return max(
        loss - ((1 - mu) * first + mu * last) for mu, loss in zip(positions, losses, strict=True)
    )


@dataclass(frozen=True)
class Checkpoint:
    """One end of a line.

    Args:
        name: such as ``digits@3``.
        tasks: number of tasks learned.
        load: loads the module in this state on the device of the probes.
    """

    name: str
    tasks: int
    load: Callable[[], ContinualModule]


def connect(
    first: Checkpoint,
    second: Checkpoint,
    probes: ProbeData,
    numbers: Sequence[int],
    *,
    row: int | None = None,
    points: int = 26,
    with_score: bool = True,
) -> Diagnostic:
    """Measure loss and score on the line between two checkpoints, and the barrier.

    Adapters are merged into the weights first (LoRA in the product B A).

    Args:
        first: at mu = 0; its module runs all points, and has its own bits again afterwards.
        second: at mu = 1.
        probes: of the stream whose tasks are measured.
        numbers: tasks and eval-only tasks.
        row: number of learned tasks that decides which classes compete, at every point; None = that
            of the later checkpoint.
        points: evenly spaced, both ends included.
        with_score: measure scores too.

    Raises:
        ValueError: if the weights are not of one architecture, buffers differ, or predictions of a
            checkpoint need more than its weights.
    """
    positions = evenly_spaced_points(points)
    learned = max(first.tasks, second.tasks) if row is None else row

    def measure(module: ContinualModule, score: bool = False) -> list[Measured]:
        return [measure_task(module, probes, learned, n, with_score=score) for n in numbers]

    end, other = _measured_end(second, measure)
    module = first.load()
    native = measure(module)
    with merged_weights(module) as own:
        start = copy_weights(own)
        names = different_weights(start, end, module.model)
        start, end = ({name: side[name] for name in names} for side in (start, end))
        try:
            measure_at = partial(_measure_at, own, lambda: measure(module, with_score))
            measured = measure_line(measure_at, start, end, positions)
        finally:
            write_weights(own, start)
    _expect_same_loss(first.name, module, native, measured[0])
    _expect_same_loss(second.name, module, other, measured[-1])
    tasks = [probes.name(number) for number in numbers]
    return _diagnostic(first.name, second.name, tasks, positions, measured, _distance(start, end))


def _measured_end(
    checkpoint: Checkpoint, measure: Callable[[ContinualModule], list[Measured]]
) -> tuple[dict[str, Tensor], list[Measured]]:
    """Return the merged weights of a checkpoint, and what its own model measures."""
    module = checkpoint.load()
    native = measure(module)
    with merged_weights(module) as own:
        return copy_weights(own), native


def _measure_at(
    own: Mapping[str, Tensor], measure: Callable[[], T], weights: Mapping[str, Tensor]
) -> T:
    write_weights(own, weights)
    return measure()


def _expect_same_loss(
    name: str, module: ContinualModule, native: Sequence[Measured], merged: Sequence[Measured]
) -> None:
    """Check that a checkpoint's weights alone give the loss of its model and strategy.

    Raises:
        ValueError: if they do not.
    """
    # Merged adapters are rounded to the precision of the weights.
    floats = [p.dtype for p in module.model.parameters() if p.is_floating_point()]
    tolerance = max([_TOLERANCE, *(8 * torch.finfo(dtype).eps for dtype in set(floats))])
    for whole, alone in zip(native, merged, strict=True):
        is_same = abs(whole.loss - alone.loss) <= tolerance * max(1.0, abs(whole.loss))
        if not is_same and math.isfinite(whole.loss):
            raise ValueError(
                f"{name} has the loss {whole.loss:.5g}, and {alone.loss:.5g} by its weights alone: "
                f"{type(module.strategy).__name__} predicts with more than weights (prompts, "
                "routed experts or a head of its own), and these lie on no line; give checkpoints "
                "of a strategy that changes weights only, or adapters that can be merged"
            )


def _distance(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> float:
    squares = [(end[name].double() - one.double()).square().sum() for name, one in start.items()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _diagnostic(
    first: str,
    second: str,
    tasks: Sequence[str],
    positions: Sequence[float],
    measured: Sequence[Sequence[Measured]],
    distance: float,
) -> Diagnostic:
    losses = [[finite_or_none(each.loss) for each in point] for point in measured]
    scores = [[finite_or_none(each.score) for each in point] for point in measured]
    panels = [Panel("loss", _with_mean(tasks, losses))]
    if any(score is not None for point in scores for score in point):
        panels.append(Panel("score", _with_mean(tasks, scores), is_score=True))
    means = [math.fsum(each.loss for each in point) / len(point) for point in measured]
    barriers = [("the mean loss", means)] if len(tasks) > 1 else []
    barriers += [(name, [point[n].loss for point in measured]) for n, name in enumerate(tasks)]
    metrics = [_barrier_metric(name, positions, values) for name, values in barriers]
    metrics.append(
        MetricValue(
            "weight distance", distance, "L2 norm of B - A over all weights, adapters merged"
        )
    )
    return Diagnostic(
        f"connect_{file_part(first)}_{file_part(second)}",
        f"Between {first} and {second}",
        "Loss and score on the straight line between the weights of two checkpoints, theta(mu) = "
        "(1 - mu) A + mu B. Adapters are merged into the weights before (LoRA in the product "
        f"B A, never A and B apart). Barrier = {_BARRIER}.",
        "mu",
        positions,
        panels,
        metrics=metrics,
        notes=[_verdict(metrics[0], losses[0])],
        settings={"first": first, "second": second, "points": str(len(positions))},
    )


def _with_mean(tasks: Sequence[str], values: Sequence[Sequence[float | None]]) -> list[Series]:
    own = [Series(name, [point[n] for point in values]) for n, name in enumerate(tasks)]
    mean = [Series("mean", [mean_or_none(point) for point in values])] if len(tasks) > 1 else []
    return mean + own


def _barrier_metric(name: str, positions: Sequence[float], losses: Sequence[float]) -> MetricValue:
    try:
        return MetricValue(f"barrier of {name}", loss_barrier(positions, losses), _BARRIER)
    except ValueError as error:
        return MetricValue(f"barrier of {name}", None, _BARRIER, str(error))


def _verdict(barrier: MetricValue, losses: Sequence[float | None]) -> str:
    start = mean_or_none(losses)
    if barrier.value is None or start is None:
        return f"No verdict: {barrier.reason or 'the loss at the start is not finite'}."
    limit = THRESHOLD * start
    is_connected = barrier.value <= limit
    return (
        f"{'Connected' if is_connected else 'Not connected'}: the {barrier.name}, "
        f"{barrier.value:.4g}, is {'at most' if is_connected else 'above'} {THRESHOLD:g} L(0) = "
        f"{limit:.4g} (the threshold is a choice of mmcl)."
    )


def file_part(name: str) -> str:
    """Return a name as a part of a file name: letters, digits and ``_ - . @``, at most 50."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.@") else "-" for c in name)[-50:]
