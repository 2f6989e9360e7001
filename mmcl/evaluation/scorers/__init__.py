"""Scorers of generated answers, each in a strict and a lenient form, each with a version.

=========  ==================================================================================
exact      equal without case, surrounding white space and a final full stop (UCIT, finance)
contains   the right answer occurs in the prediction (MLLM-DCL, medicine)
fraction   fraction of a comma-separated right list that was predicted (MLLM-DCL, maps)
option     the letter of a multiple choice (ScienceQA)
vqa        VQA accuracy: how many of ten annotators gave the answer (VQAv2, TextVQA, VizWiz)
box        four numbers with IoU of at least 0.5 (RefCOCO)
bleu       corpus BLEU-4
cider      CIDEr-D / 10
caption    mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D cut at 1
=========  ==================================================================================

An empty prediction scores 0 in all of them, and every sample counts, also one without a prediction.
"""

from __future__ import annotations

from mmcl.evaluation.scorers.captions import BLEU, CAPTION, CIDER
from mmcl.evaluation.scorers.scorer import Scorer, ScoreResult
from mmcl.evaluation.scorers.short_answers import BOX, CONTAINS, EXACT, FRACTION, OPTION, VQA

__all__ = ["SCORERS", "ScoreResult", "Scorer", "find_scorer"]

SCORERS: dict[str, Scorer] = {
    "exact": EXACT, "contains": CONTAINS, "fraction": FRACTION, "option": OPTION, "vqa": VQA,
    "box": BOX, "bleu": BLEU, "cider": CIDER, "caption": CAPTION,
}  # fmt: skip


def find_scorer(name: str) -> Scorer:
    """Return the scorer of a name (``exact``) or a version (``exact/1``).

    Raises:
        ValueError: if there is none of that name, or its rule has another version now.
    """
    scorer = SCORERS.get(name.partition("/")[0])
    if scorer is None:
        raise ValueError(f"there is no scorer {name!r}: choose one of {', '.join(SCORERS)}")
    if "/" in name and name != scorer.version:
        raise ValueError(
            f"there is no scorer {name!r}, only {scorer.version}: use {scorer.name!r} to score by "
            "the current rule, or the mmcl version that wrote it"
        )
    return scorer
