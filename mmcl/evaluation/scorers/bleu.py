"""BLEU-1 to BLEU-4 of tokenized texts, with n-gram counts of sacrebleu.

A file of its own: it is checked against sacrebleu as a function.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

ORDERS = 4
Words = tuple[str, ...]


def corpus_bleu(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 of a test set, Papineni et al. 2002, no smoothing, each 0 to 1.

    The brevity penalty takes the reference nearest in length. An order that no reference is long
    enough for is left out, so that predictions equal to their references score 1.

    Args:
        predictions: words of each sample's prediction.
        references: words of each reference of each sample; samples may differ in number.
    """
    streams = zip_longest(*([" ".join(text) for text in right] for right in references))
    texts = [" ".join(text) for text in predictions]
    counted = _metric().corpus_score(texts, list(map(list, streams)))
    longest = max(len(text) for right in references for text in right)
    if not longest:
        return [0.0] * ORDERS
    return _orders(counted, min(longest, ORDERS), smoothing=0)


def sentence_bleu(prediction: Words, references: Sequence[Words]) -> list[float]:
    """Sentence BLEU-1 to BLEU-4 of one prediction, one added to the counts of orders 2 to 4.

    Smoothing of Lin and Och 2004; without it nearly every sentence has a BLEU-4 of 0. Nothing is
    added to an order that the prediction is too short for, which would make it 1 of 1: there it is
    0, unless the references are too short for it too.
    """
    counted = _metric().sentence_score(
        " ".join(prediction), [" ".join(text) for text in references]
    )
    longest = max(map(len, references))
    return _orders(counted, min(longest, ORDERS), smoothing=1) if longest else [0.0] * ORDERS


def _metric() -> Any:
    # Only caption scorers need sacrebleu.
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise ImportError(
            "captions are scored with sacrebleu, which is not installed: pip install mmcl[captions]"
        ) from None
    return BLEU(tokenize="none", smooth_method="none", effective_order=True, force=True)


def _orders(counted: Any, known: int, smoothing: int) -> list[float]:
    """BLEU of each order: brevity penalty times the geometric mean of the precisions up to it."""
    values: list[float] = []
    logarithm = 0.0
    for order in range(1, known + 1):
        right, total = counted.counts[order - 1], counted.totals[order - 1]
        added = smoothing if order > 1 and total else 0
        if not right + added:
            return [*values, *[0.0] * (ORDERS - len(values))]
        logarithm += math.log((right + added) / (total + added))
        values.append(min(1.0, counted.bp * math.exp(logarithm / order)))
    return [*values, *[values[-1]] * (ORDERS - known)]
