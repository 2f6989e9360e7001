"""All metrics of an accuracy matrix, in the order of the report."""

from __future__ import annotations

from functools import partial

from mmcl.evaluation.continual_metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    learning_accuracy,
    mean_average_accuracy,
    pooled_accuracy,
)
from mmcl.evaluation.matrix import AccuracyMatrix
from mmcl.evaluation.metric import MetricValue
from mmcl.evaluation.zero_shot_metrics import (
    backward_in_time,
    eval_only_retention,
    forward_in_time,
    forward_transfer,
    harmonic_mean,
    in_domain,
    mtil_average,
    mtil_last,
    mtil_transfer,
    unseen_accuracy,
    zero_shot_accuracy,
    zero_shot_degradation,
)

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


def compute_all_metrics(matrix: AccuracyMatrix, after: int | None = None) -> list[MetricValue]:
    """Compute all metrics of a matrix; undefined ones hold the reason.

    Args:
        matrix: the scores.
        after: number of learned tasks, None for the last row measured.

    Raises:
        ValueError: if the stream has fewer than ``after`` tasks.
    """
    return [metric(matrix, after) for metric in _ORDER] + eval_only_retention(matrix, after)
