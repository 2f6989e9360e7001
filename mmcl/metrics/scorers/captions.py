"""Scorers of captions: bleu, cider and caption.

Their score of a test set is not, or not only, the mean of its rows: BLEU counts n-grams over all
rows before it divides. Rows get the value of their own sentence. Lenient takes of every answer the
whole or the one sentence in it that scores best, so that talk around a caption costs nothing.

* ``bleu``: corpus BLEU-4; rows are smoothed sentence BLEU-4 (``mmcl.metrics.scorers.bleu``).
* ``cider``: CIDEr-D / 10, the mean of its rows; times 1000 it is what papers print ("112.3").
* ``caption``: mean of six: BLEU-1, -2, -3, -4, ROUGE-L and CIDEr-D, the last cut at 1. UCIT prints
  the mean of seven, with METEOR, which needs Java, and with CIDEr-D unbounded, which then outweighs
  the others. So ``caption`` is comparable between our runs and not with UCIT's tables; the six are
  in the extras, CIDEr-D uncut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmcl.metrics.scorers.bleu import corpus_bleu, sentence_bleu
from mmcl.metrics.scorers.cider import Cider, Words, rouge_l
from mmcl.metrics.scorers.scored import References, Scored, check_rows, is_blank, mean
from mmcl.metrics.scorers.words import words

_ENDS = re.compile(r"[.!?:;\n。！？：；]+")
Rows = Sequence[Sequence[Words]]


class Measure(Protocol):
    """A way to compare captions with the references of a test set."""

    def row(self, place: int, said: Words) -> float:
        """Score one answer, which has words, 0 to 1."""

    def whole(self, said: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Score all answers, 0 to 1, and give further numbers."""


class Bleu:
    """BLEU-4; see the module."""

    def __init__(self, references: Rows) -> None:
        self.references = references

    def row(self, place: int, said: Words) -> float:
        """Smoothed sentence BLEU-4."""
        return sentence_bleu(said, self.references[place])[-1]

    def whole(self, said: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Corpus BLEU-4, the lower orders beside it."""
        orders = corpus_bleu(said, self.references)
        return orders[-1], {f"bleu-{n}": value for n, value in enumerate(orders, 1)}


class CiderD:
    """CIDEr-D / 10; see the module."""

    def __init__(self, references: Rows) -> None:
        self.cider = Cider(references)

    def row(self, place: int, said: Words) -> float:
        """CIDEr-D / 10 of one answer."""
        return min(1.0, self.cider.score(place, said) / 10)

    def whole(self, said: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Mean over the rows; ``cider-d`` runs to 10."""
        value = mean([self.cider.score(place, text) for place, text in enumerate(said)])
        return min(1.0, value / 10), {"cider-d": value}


class SixMeans:
    """Mean of BLEU-1 to BLEU-4, ROUGE-L and CIDEr-D; see the module."""

    def __init__(self, references: Rows) -> None:
        self.references, self.bleu, self.cider = references, Bleu(references), CiderD(references)

    def row(self, place: int, said: Words) -> float:
        """Mean of the six for one answer."""
        cider = self.cider.cider.score(place, said)
        orders = sentence_bleu(said, self.references[place])
        return mean([*orders, rouge_l(said, self.references[place]), min(1.0, cider)])

    def whole(self, said: Sequence[Words]) -> tuple[float, Mapping[str, float]]:
        """Mean of the six over all rows; each of the six beside it."""
        orders = self.bleu.whole(said)[1]
        cider = self.cider.whole(said)[1]
        pairs = zip(said, self.references, strict=True)
        rouge = mean([rouge_l(text, right) for text, right in pairs])
        six = [*orders.values(), rouge, min(1.0, cider["cider-d"])]
        return mean(six), {**orders, "rouge-l": rouge, **cider}


@dataclass(frozen=True)
class CaptionScorer:
    """A scorer of captions; its score of the whole may differ from the mean of the rows.

    Args:
        name: on a card.
        version: name and number of the rule.
        measure: makes the measure of a test set from its references.
    """

    name: str
    version: str
    measure: Callable[[Rows], Measure]

    def score(self, answers: Sequence[str], references: Sequence[References]) -> Scored:
        """Score captions; see ``Scorer`` and the module."""
        check_rows(answers, references)
        said = [words(answer) for answer in answers]
        measure = self.measure([_worded(right) for right in references])
        strict_rows, lenient_rows, best = [], [], []
        for place, answer in enumerate(answers):
            choices = _choices(said[place], answer)
            values = [measure.row(place, text) if text else 0.0 for text in choices]
            lenient_rows.append(max(values))
            strict_rows.append(values[0])
            best.append(choices[values.index(max(values))])
        strict, extras = measure.whole(said)
        lenient = strict if best == said else max(strict, measure.whole(best)[0])
        return Scored(strict_rows, lenient_rows, strict, lenient, extras)


BLEU = CaptionScorer("bleu", "bleu/1", Bleu)
CIDER = CaptionScorer("cider", "cider/1", CiderD)
CAPTION = CaptionScorer("caption", "caption/1", SixMeans)


def _worded(references: References) -> list[Words]:
    """Give the words of the references that have any."""
    return [found for found in map(words, references) if found] or [()]


def _choices(whole: Words, answer: str) -> list[Words]:
    parts = [part for part in _ENDS.split(answer) if not is_blank(part)]
    return [whole, *(words(part) for part in parts if len(parts) > 1)]
