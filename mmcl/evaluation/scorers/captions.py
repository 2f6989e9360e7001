"""Scorers of captions: bleu, cider and caption.

The score of a test set is not always the mean over its samples: BLEU counts n-grams over all
samples before it divides. A sample gets the value of its own sentence. The lenient score takes the
whole prediction or its best single sentence, so that text around a caption costs nothing.

* ``bleu``: corpus BLEU-4; samples get smoothed sentence BLEU-4 (``mmcl.evaluation.scorers.bleu``).
* ``cider``: CIDEr-D / 10, the mean over samples; times 1000 it is what papers print ("112.3").
* ``caption``: mean of six: BLEU-1, -2, -3, -4, ROUGE-L and CIDEr-D, the last cut at 1. UCIT prints
  the mean of seven, with METEOR, which needs Java, and with CIDEr-D unbounded, which then outweighs
  the others. So ``caption`` is comparable between our runs and not with UCIT's tables; the six are
  in the extras, CIDEr-D uncut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from mmcl.evaluation.scorers.bleu import corpus_bleu, sentence_bleu
from mmcl.evaluation.scorers.cider import Cider, Words, rouge_l
from mmcl.evaluation.scorers.scorer import References, ScoreResult, check_references, is_blank
from mmcl.evaluation.scorers.text_normalization import words

_ENDS = re.compile(r"[.!?:;\n。！？：；]+")
SampleReferences = Sequence[Sequence[Words]]


class Measure(Protocol):
    """Caption metric bound to the references of a test set."""

    def sentence(self, index: int, prediction: Words) -> float:
        """Sentence score of one prediction that is not empty, 0 to 1."""

    def corpus(self, predictions: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Corpus score of all predictions, 0 to 1, and further numbers by name."""


class Bleu:
    """BLEU-4 measure; see the module."""

    def __init__(self, references: SampleReferences) -> None:
        self.references = references

    def sentence(self, index: int, prediction: Words) -> float:
        """Smoothed sentence BLEU-4."""
        return sentence_bleu(prediction, self.references[index])[-1]

    def corpus(self, predictions: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Corpus BLEU-4, and each order in the extras."""
        orders = corpus_bleu(predictions, self.references)
        return orders[-1], {f"bleu-{n}": value for n, value in enumerate(orders, 1)}


class CiderD:
    """CIDEr-D / 10 measure; see the module."""

    def __init__(self, references: SampleReferences) -> None:
        self.cider = Cider(references)

    def sentence(self, index: int, prediction: Words) -> float:
        """CIDEr-D / 10 of one prediction."""
        return min(1.0, self.cider.score(index, prediction) / 10)

    def corpus(self, predictions: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Mean CIDEr-D / 10 over the samples; the extra ``cider-d`` is 0 to 10."""
        value = fmean([self.cider.score(index, text) for index, text in enumerate(predictions)])
        return min(1.0, value / 10), {"cider-d": value}


class CaptionMean:
    """Mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D; see the module."""

    def __init__(self, references: SampleReferences) -> None:
        self.references, self.bleu, self.cider = references, Bleu(references), CiderD(references)

    def sentence(self, index: int, prediction: Words) -> float:
        """Mean of the six for one prediction."""
        cider = self.cider.cider.score(index, prediction)
        orders = sentence_bleu(prediction, self.references[index])
        return fmean([*orders, rouge_l(prediction, self.references[index]), min(1.0, cider)])

    def corpus(self, predictions: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Mean of the six over all samples, and each of the six in the extras."""
        orders = self.bleu.corpus(predictions)[1]
        cider = self.cider.corpus(predictions)[1]
        pairs = zip(predictions, self.references, strict=True)
        rouge = fmean([rouge_l(text, right) for text, right in pairs])
        six = [*orders.values(), rouge, min(1.0, cider["cider-d"])]
        return fmean(six), {**orders, "rouge-l": rouge, **cider}


@dataclass(frozen=True)
class CaptionScorer:
    """Scorer of captions; the corpus score may differ from the mean over samples.

    Args:
        name: on a card.
        version: name and number of the rule.
        measure: makes the caption metric of a test set from its references.
    """

    name: str
    version: str
    measure: Callable[[SampleReferences], Measure]

    def score(self, answers: Sequence[str], references: Sequence[References]) -> ScoreResult:
        """Score captions; see ``Scorer`` and the module."""
        check_references(answers, references)
        predictions = [words(answer) for answer in answers]
        measure = self.measure([_nonempty(right) for right in references])
        strict_scores, lenient_scores, best = [], [], []
        for index, answer in enumerate(answers):
            candidates = _candidates(predictions[index], answer)
            values = [measure.sentence(index, text) if text else 0.0 for text in candidates]
            lenient_scores.append(max(values))
            strict_scores.append(values[0])
            best.append(candidates[values.index(max(values))])
        strict, extras = measure.corpus(predictions)
        lenient = strict if best == predictions else max(strict, measure.corpus(best)[0])
        return ScoreResult(strict_scores, lenient_scores, strict, lenient, extras)


BLEU = CaptionScorer("bleu", "bleu/1", Bleu)
CIDER = CaptionScorer("cider", "cider/1", CiderD)
CAPTION = CaptionScorer("caption", "caption/1", CaptionMean)


def _nonempty(references: References) -> list[Words]:
    """Return the words of the references that have any."""
    return [found for found in map(words, references) if found] or [()]


def _candidates(whole: Words, answer: str) -> list[Words]:
    """Return the words of the whole prediction, then those of each of its sentences."""
    sentences = [each for each in _ENDS.split(answer) if not is_blank(each)]
    return [whole, *(words(each) for each in sentences if len(sentences) > 1)]
