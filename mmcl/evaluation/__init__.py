"""Evaluation: accuracy matrix, metrics, predictions and their scorers, training cost, summary."""

from mmcl.evaluation.continual_metrics import MAIN, MetricValue, compute_all_metrics
from mmcl.evaluation.cost import Ledger, TaskCost
from mmcl.evaluation.evaluators import evaluate
from mmcl.evaluation.matrix import AccuracyMatrix, Column
from mmcl.evaluation.predictions import (
    Prediction,
    accuracy,
    predictions_path,
    read_predictions,
    rescore,
    write_predictions,
)
from mmcl.evaluation.retrieval import Retrieval, recall_at_k
from mmcl.evaluation.run_files import RunFiles, RunSummary
from mmcl.evaluation.scorers import Scorer, ScoreResult, find_scorer

__all__ = [
    "MAIN", "AccuracyMatrix", "Column", "Ledger", "MetricValue", "Prediction", "Retrieval",
    "RunFiles", "RunSummary", "ScoreResult", "Scorer", "TaskCost", "accuracy",
    "compute_all_metrics", "evaluate", "find_scorer", "predictions_path", "read_predictions",
    "recall_at_k", "rescore", "write_predictions",
]  # fmt: skip
