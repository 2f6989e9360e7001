"""Every figure of a matrix, in the order in which a person wants to read them."""

from __future__ import annotations

from functools import partial

from mmcl.metrics.figure import Figure
from mmcl.metrics.learning import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_of,
    learning_accuracy,
    mean_average_accuracy,
    over_training,
    plasticity_gap,
    pooled_accuracy,
)
from mmcl.metrics.matrix import AccuracyMatrix
from mmcl.metrics.transfer import (
    backward_in_time,
    forward_in_time,
    forward_transfer,
    harmonic_mean,
    in_domain,
    mtil_average,
    mtil_last,
    mtil_transfer,
    probe_retention,
    unseen_accuracy,
    zero_shot_accuracy,
    zero_shot_degradation,
)

__all__ = [
    "MAIN",
    "Figure",
    "all_figures",
    "average_accuracy",
    "backward_in_time",
    "backward_transfer",
    "forgetting",
    "forgetting_of",
    "forward_in_time",
    "forward_transfer",
    "harmonic_mean",
    "in_domain",
    "learning_accuracy",
    "mean_average_accuracy",
    "mtil_average",
    "mtil_last",
    "mtil_transfer",
    "over_training",
    "plasticity_gap",
    "pooled_accuracy",
    "probe_retention",
    "unseen_accuracy",
    "zero_shot_accuracy",
    "zero_shot_degradation",
]

MAIN = (
    "average accuracy",
    "mean average accuracy",
    "learning accuracy",
    "forgetting",
    "backward transfer",
    "forward transfer",
)

_ORDER = (
    average_accuracy,
    pooled_accuracy,
    mean_average_accuracy,
    learning_accuracy,
    forgetting,
    partial(forgetting, from_zero=True),
    backward_transfer,
    partial(backward_transfer, divisor="t"),
    forward_transfer,
    zero_shot_accuracy,
    zero_shot_degradation,
    mtil_transfer,
    mtil_average,
    mtil_last,
    in_domain,
    backward_in_time,
    forward_in_time,
    unseen_accuracy,
    harmonic_mean,
)


def all_figures(matrix: AccuracyMatrix, after: int | None = None) -> list[Figure]:
    """Compute every figure, those of ``MAIN`` first among them; undefined ones say why.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row in which anything was measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    return [figure(matrix, after) for figure in _ORDER] + probe_retention(matrix, after)
