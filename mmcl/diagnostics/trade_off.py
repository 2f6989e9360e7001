"""Trade-off of old against new ability over sets of weights, such as those of a merge.

The ability of a group of tasks is the mean of their scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from mmcl.diagnostics.interpolated_weights import copy_weights, merged_weights, write_weights
from mmcl.diagnostics.task_loss import ProbeData, finite_or_none, measure_task
from mmcl.lightning.module import ContinualModule


@dataclass(frozen=True)
class TradeOffPoint:
    """Scores of one set of weights.

    Attributes:
        value: of the setting that made the weights.
        scores: name of a task -> score, 0 to 1.
        old: mean score of the old tasks.
        new: mean score of the new tasks.
    """

    value: float
    scores: Mapping[str, float]
    old: float
    new: float

    @property
    def mean(self) -> float:
        """Mean of old and new ability."""
        return (self.old + self.new) / 2


def measure_trade_off(
    module: ContinualModule,
    candidates: Iterable[tuple[float, Mapping[str, Tensor]]],
    probes: ProbeData,
    row: int,
    *,
    old: Sequence[int],
    new: Sequence[int],
) -> list[TradeOffPoint]:
    """Score sets of plain weights on old and on new tasks, on their test samples.

    Args:
        module: runs all weights on the device of the probes, and has its own again afterwards.
        candidates: value and weights of each point, under the names of an export.
        probes: of the stream of the tasks.
        row: number of learned tasks, which decides the classes that compete.
        old: tasks and eval-only tasks, 1 or more.
        new: others, 1 or more.

    Returns:
        a point for each candidate, in their order.

    Raises:
        ValueError: if a task has no score, or the model lacks a weight.
    """
    numbers = [*old, *new]
    points = []
    with _own_weights(module) as own:
        for value, weights in candidates:
            write_weights(own, _named_as(own, weights))
            scores = [_score(module, probes, row, number) for number in numbers]
            named = dict(zip(map(probes.name, numbers), scores, strict=True))
            points.append(
                TradeOffPoint(value, named, _mean(scores[: len(old)]), _mean(scores[len(old) :]))
            )
    return points


def best_point(points: Sequence[TradeOffPoint]) -> int:
    """Return the index of the point with the highest mean of old and new, the first of equals."""
    return max(range(len(points)), key=lambda index: points[index].mean)


@contextmanager
def _own_weights(module: ContinualModule) -> Iterator[dict[str, Tensor]]:
    """Yield the weights of the open_clip or transformers model, named as in an export."""
    prefix = "lm." if getattr(cast(Any, module.model), "clip", None) is None else "clip."
    with merged_weights(module) as every:
        own = {n.removeprefix(prefix): t for n, t in every.items() if n.startswith(prefix)}
        start = copy_weights(own)
        try:
            yield own
        finally:
            write_weights(own, start)


def _named_as(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    missing = [name for name in weights if name not in own]
    if missing:
        raise ValueError(
            f"the model has no weight '{missing[0]}' to be replaced ({len(missing)} are missing): "
            "merge without a range, and evaluate the exports"
        )
    return weights


def _score(module: ContinualModule, probes: ProbeData, row: int, number: int) -> float:
    score = finite_or_none(measure_task(module, probes, row, number, with_score=True).score)
    if score is None:
        raise ValueError(
            f"'{probes.name(number)}' has no score: name other tasks in --old or --new"
        )
    return score


def _mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)
