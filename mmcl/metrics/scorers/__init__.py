"""Scorers of generated answers, each in a strict and a lenient form, each with a version.

=========  ==================================================================================
exact      equal without case, surrounding white space and a final full stop (UCIT, finance)
contains   the right answer stands in what was said (MLLM-DCL, medicine)
fraction   share of a right list, separated by commas, that was given (MLLM-DCL, maps)
option     the letter of a multiple choice (ScienceQA)
vqa        VQA accuracy: how many of ten people gave the answer (VQAv2, TextVQA, VizWiz)
box        four numbers with IoU of at least 0.5 (RefCOCO)
bleu       corpus BLEU-4
cider      CIDEr-D / 10
caption    mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D cut at 1
=========  ==================================================================================

An empty answer is worth 0 in all of them, and every row counts, also one that was not answered.
"""

from __future__ import annotations

from mmcl.metrics.scorers.box import BOX
from mmcl.metrics.scorers.captions import BLEU, CAPTION, CIDER
from mmcl.metrics.scorers.phrases import CONTAINS, EXACT, FRACTION, OPTION
from mmcl.metrics.scorers.scored import Scored, Scorer
from mmcl.metrics.scorers.vqa import VQA

__all__ = ["SCORERS", "Scored", "Scorer", "find_scorer"]

_ALL: tuple[Scorer, ...] = (EXACT, CONTAINS, FRACTION, OPTION, VQA, BOX, BLEU, CIDER, CAPTION)
SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in _ALL}


def find_scorer(name: str) -> Scorer:
    """Give the scorer of that name, such as ``exact``; a version (``exact/1``) names it too.

    Raises:
        ValueError: if there is none of that name, or its rule has another version now.
    """
    scorer = SCORERS.get(name.partition("/")[0])
    if scorer is None:
        raise ValueError(f"there is no scorer {name!r}: choose one of {', '.join(SCORERS)}")
    if "/" in name and name != scorer.version:
        raise ValueError(
            f"the scorer {name!r} is not here, only {scorer.version}: take {scorer.name!r} to "
            "score by the present rule, or the mmcl that wrote it"
        )
    return scorer
