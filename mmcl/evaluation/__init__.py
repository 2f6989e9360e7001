"""Evaluation: accuracy matrix, metrics, predictions and their scorers, training cost, summary."""

from mmcl.evaluation.all_metrics import MAIN, compute_all_metrics
from mmcl.evaluation.cost import Ledger, TaskCost
from mmcl.evaluation.matrix import AccuracyMatrix, Column
from mmcl.evaluation.metric import MetricValue
from mmcl.evaluation.predictions import (
    Prediction,
    accuracy,
    read_predictions,
    rescore,
    write_predictions,
)
from mmcl.evaluation.retrieval import Retrieval, recall_at_k
from mmcl.evaluation.run_files import RunFiles, predictions_path
from mmcl.evaluation.scorers import Scorer, ScoreResult, find_scorer
from mmcl.evaluation.summary import RunSummary

__all__ = [
    "MAIN",
    "AccuracyMatrix",
    "Prediction",
    "Column",
    "MetricValue",
    "Ledger",
    "Retrieval",
    "RunFiles",
    "RunSummary",
    "ScoreResult",
    "Scorer",
    "TaskCost",
    "accuracy",
    "compute_all_metrics",
    "predictions_path",
    "find_scorer",
    "rescore",
    "read_predictions",
    "recall_at_k",
    "write_predictions",
]
