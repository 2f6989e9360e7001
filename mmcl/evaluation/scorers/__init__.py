"""Scorers of generated answers, each in a strict and a lenient form, each with a version.

=========  ==================================================================================
exact      equal without case, surrounding white space and a final full stop (UCIT, finance)
contains   the right answer occurs in the prediction (MLLM-DCL, medicine)
fraction   fraction of a comma-separated right list that was predicted (MLLM-DCL, maps)
option     the option of a multiple choice, by letter or text (ScienceQA, MMBench)
vqa        VQA accuracy: how many of ten annotators gave the answer (VQAv2, VizWiz)
textvqa    the same with TextVQA's normalization
anls       similarity of characters to the nearest right answer (DocVQA)
box        a box with IoU of at least 0.5, in the forms of ``boxes`` (RefCOCO)
pope       yes/no with POPE's accuracy, precision, recall, F1 and fraction of yes
mme        yes/no with MME's accuracy and accuracy+ of every category, and their sums
bleu       corpus BLEU-4
cider      CIDEr-D / 10
caption    mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D cut at 1
=========  ==================================================================================

An empty prediction scores 0 in all of them, and every sample counts, also one without a prediction.
"""

from __future__ import annotations

from mmcl.evaluation.scorers.boxes import BOX
from mmcl.evaluation.scorers.captions import BLEU, CAPTION, CIDER
from mmcl.evaluation.scorers.multiple_choice import OPTION
from mmcl.evaluation.scorers.scorer import Scorer, ScoreResult
from mmcl.evaluation.scorers.short_answers import (
    ANLS,
    CONTAINS,
    EXACT,
    FRACTION,
    TEXTVQA,
    VQA,
)
from mmcl.evaluation.scorers.yes_no import MME, POPE

__all__ = ["SCORERS", "ScoreResult", "Scorer", "find_scorer"]

SCORERS: dict[str, Scorer] = {
    "exact": EXACT, "contains": CONTAINS, "fraction": FRACTION, "option": OPTION, "vqa": VQA,
    "textvqa": TEXTVQA, "anls": ANLS, "box": BOX, "pope": POPE, "mme": MME, "bleu": BLEU,
    "cider": CIDER, "caption": CAPTION,
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
