"""From outputs to numbers: the matrix, its figures, the answers behind it, what it all cost."""

from mmcl.metrics.answers import (
    Answer,
    accuracy,
    answers_path,
    grade,
    read_answers,
    write_answers,
)
from mmcl.metrics.cost import Ledger, TaskCost
from mmcl.metrics.figures import MAIN, Figure, all_figures
from mmcl.metrics.matrix import AccuracyMatrix, Column
from mmcl.metrics.retrieval import Retrieval, recall_at_k
from mmcl.metrics.scorers import Scored, Scorer, find_scorer
from mmcl.metrics.summary import RunSummary

__all__ = [
    "MAIN",
    "AccuracyMatrix",
    "Answer",
    "Column",
    "Figure",
    "Ledger",
    "Retrieval",
    "RunSummary",
    "Scored",
    "Scorer",
    "TaskCost",
    "accuracy",
    "all_figures",
    "answers_path",
    "find_scorer",
    "grade",
    "read_answers",
    "recall_at_k",
    "write_answers",
]
