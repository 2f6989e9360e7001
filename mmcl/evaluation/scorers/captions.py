"""Scorers of captions: bleu, cider and caption.

The score of a test set is not always the mean over its samples: BLEU counts n-grams over all
samples before it divides. A sample gets the value of its own sentence. The lenient score takes the
whole prediction or its best single sentence, so that text around a caption costs nothing.

* ``bleu``: corpus BLEU-4; samples get smoothed sentence BLEU-4.
* ``cider``: CIDEr-D / 10, the mean over samples; times 1000 it is what papers print ("112.3").
* ``caption``: mean of six: BLEU-1, -2, -3, -4, ROUGE-L and CIDEr-D, the last cut at 1. UCIT prints
  the mean of seven, with METEOR, which needs Java, and with CIDEr-D unbounded, which then outweighs
  the others. So ``caption`` is comparable between our runs and not with UCIT's tables; the six are
  in the extras, CIDEr-D uncut.

CIDEr-D is Vedantam et al. 2015, arXiv:1411.5726, as the COCO caption evaluation computes it: counts
of 1- to 4-grams, clipped by the reference's, weighted by inverse document frequency over the
samples' references, and a Gaussian penalty (sigma 6 words) for another length. ROUGE-L is Lin 2004,
with COCO's beta 1.2. No library computes the pair without Java; COCO's tokenizer (in Java) differs
from ours in contractions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean
from typing import Any, Protocol

from mmcl.evaluation.scorers.scorer import References, ScoreResult, check_references, is_blank
from mmcl.evaluation.scorers.text_normalization import words

ORDERS = 4
SIGMA = 6.0
BETA = 1.2
_ENDS = re.compile(r"[.!?:;\n。！？：；]+")
Words = tuple[str, ...]
Corpus = tuple[float, Mapping[str, float]]
"""Corpus score, 0 to 1, and further numbers by name."""


class Measure(Protocol):
    """Caption metric bound to the references of a test set."""

    def sentence(self, index: int, prediction: Words) -> float:
        """Sentence score of one prediction that is not empty, 0 to 1."""

    def corpus(self, predictions: Sequence[Words]) -> Corpus:
        """Corpus score of all predictions, and further numbers by name."""


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
    measure: Callable[[Sequence[Sequence[Words]]], Measure]

    def score(
        self,
        answers: Sequence[str],
        references: Sequence[References],
        questions: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> ScoreResult:
        """Score captions; see ``Scorer`` and the module."""
        check_references(answers, references)
        predictions = [words(answer) for answer in answers]
        measure = self.measure(
            [[found for found in map(words, right) if found] or [()] for right in references]
        )
        strict_scores, lenient_scores, best = [], [], []
        for index, answer in enumerate(answers):
            sentences = [each for each in _ENDS.split(answer) if not is_blank(each)]
            alone = map(words, sentences if len(sentences) > 1 else ())
            candidates = [predictions[index], *alone]
            values = [measure.sentence(index, text) if text else 0.0 for text in candidates]
            lenient_scores.append(max(values))
            strict_scores.append(values[0])
            best.append(candidates[values.index(max(values))])
        strict, extras = measure.corpus(predictions)
        lenient = strict if best == predictions else max(strict, measure.corpus(best)[0])
        return ScoreResult(strict_scores, lenient_scores, strict, lenient, extras)


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


class Bleu:
    """BLEU-4 measure; the orders are in the extras."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.references = references

    def sentence(self, index: int, prediction: Words) -> float:
        """Smoothed sentence BLEU-4."""
        return sentence_bleu(prediction, self.references[index])[-1]

    def corpus(self, predictions: Sequence[Words]) -> Corpus:
        """Corpus BLEU-4."""
        orders = corpus_bleu(predictions, self.references)
        return orders[-1], {f"bleu-{n}": value for n, value in enumerate(orders, 1)}


class Cider:
    """CIDEr-D / 10 measure; the extra ``cider-d`` is 0 to 10.

    Args:
        references: words of each reference of each sample. With a single sample every n-gram would
            have weight 0; there all have weight 1.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        document_frequency: Counter[Words] = Counter()
        for right in references:
            document_frequency.update({gram for text in right for gram in _grams(text)})
        self._document_frequency = document_frequency
        self._samples = len(references)
        self._references = [[self._weigh(text) for text in right] for right in references]

    def score(self, index: int, prediction: Words) -> float:
        """CIDEr-D of one prediction against the references of sample ``index``, 0 to 10."""
        mine = self._weigh(prediction)
        values = []
        for theirs in self._references[index]:
            penalty = math.exp(-((len(prediction) - theirs[2]) ** 2) / (2 * SIGMA**2))
            similarities = map(_clipped_cosine, mine[0], theirs[0], mine[1], theirs[1])
            values.append(penalty * math.fsum(similarities))
        return 10.0 * math.fsum(values) / (ORDERS * len(values))

    def sentence(self, index: int, prediction: Words) -> float:
        """CIDEr-D / 10 of one prediction."""
        return min(1.0, self.score(index, prediction) / 10)

    def corpus(self, predictions: Sequence[Words]) -> Corpus:
        """Mean CIDEr-D / 10 over the samples."""
        value = fmean([self.score(index, text) for index, text in enumerate(predictions)])
        return min(1.0, value / 10), {"cider-d": value}

    def _weigh(self, text: Words) -> tuple[list[dict[Words, float]], list[float], int]:
        """Return the tf-idf vector of each order, their norms, and the number of words."""
        vectors: list[dict[Words, float]] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(text).items():
            frequency = max(1, self._document_frequency[gram])
            idf = 1.0 if self._samples == 1 else math.log(self._samples) - math.log(frequency)
            vectors[len(gram) - 1][gram] = count * idf
        norms = [math.sqrt(math.fsum(value**2 for value in each.values())) for each in vectors]
        return vectors, norms, len(text)


def _clipped_cosine(
    mine: dict[Words, float], theirs: dict[Words, float], my_norm: float, their_norm: float
) -> float:
    if not my_norm or not their_norm:
        return 0.0
    shared = (
        min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs
    )
    return math.fsum(shared) / (my_norm * their_norm)


def _grams(text: Words) -> Counter[Words]:
    return Counter(
        text[start : start + order]
        for order in range(1, ORDERS + 1)
        for start in range(len(text) - order + 1)
    )


def rouge_l(prediction: Words, references: Sequence[Words]) -> float:
    """ROUGE-L: F score of the longest common subsequence, best precision and best recall, 0 to 1.

    Args:
        prediction: its words.
        references: each reference's words.
    """
    shared = [common_length(prediction, right) for right in references]
    if not prediction or not any(shared):
        return 0.0
    precision = max(shared) / len(prediction)
    recall = max(n / len(right) for n, right in zip(shared, references, strict=True) if right)
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(one: Words, other: Words) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        lengths = [0]
        for n, match in enumerate(other):
            lengths.append(before[n] + 1 if word == match else max(lengths[n], before[n + 1]))
        before = lengths
    return before[-1]


class CaptionMean:
    """Mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D; each is in the extras."""

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.references, self.bleu, self.cider = references, Bleu(references), Cider(references)

    def sentence(self, index: int, prediction: Words) -> float:
        """Mean of the six for one prediction."""
        cider = self.cider.score(index, prediction)
        orders = sentence_bleu(prediction, self.references[index])
        return fmean([*orders, rouge_l(prediction, self.references[index]), min(1.0, cider)])

    def corpus(self, predictions: Sequence[Words]) -> Corpus:
        """Mean of the six over all samples."""
        orders = self.bleu.corpus(predictions)[1]
        cider = self.cider.corpus(predictions)[1]
        pairs = zip(predictions, self.references, strict=True)
        rouge = fmean([rouge_l(text, right) for text, right in pairs])
        six = [*orders.values(), rouge, min(1.0, cider["cider-d"])]
        return fmean(six), {**orders, "rouge-l": rouge, **cider}


BLEU = CaptionScorer("bleu", "bleu/1", Bleu)
CIDER = CaptionScorer("cider", "cider/1", Cider)
CAPTION = CaptionScorer("caption", "caption/1", CaptionMean)
