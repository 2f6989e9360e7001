"""Scorer interface, its result, and the scorer whose score is the mean over samples."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple, Protocol

References = tuple[str, ...]

# Categories of characters that show nothing: separators, control and format (zero-width) ones.
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")


@dataclass(frozen=True)
class ScoreResult:
    """Strict and lenient scores of predictions, all in 0 to 1.

    Args:
        strict_scores: per sample, in the form that the question requests.
        lenient_scores: per sample, in any form, at least the strict score. A high lenient and a low
            strict score is a lost format, two low ones are lost knowledge.
        strict: of all samples; the mean of ``strict_scores`` unless the scorer says otherwise.
        lenient: of all samples, at least ``strict``.
        extras: further numbers by name, such as ``iou``; not bound to 0 to 1.
    """

    strict_scores: list[float]
    lenient_scores: list[float]
    strict: float
    lenient: float
    extras: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Scorer of predictions against right answers; an empty prediction scores 0."""

    @property
    def name(self) -> str:
        """Name of the scorer on a card, such as ``exact``."""

    @property
    def version(self) -> str:
        """Version: name and number of the rule, such as ``exact/1``; another rule, another one."""

    def score(
        self,
        answers: Sequence[str],
        references: Sequence[References],
        questions: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> ScoreResult:
        """Score predictions.

        Args:
            answers: one prediction per sample.
            references: all right answers of each sample, in the same order.
            questions: of each sample; () = unknown. ``option`` reads the options that they list.
            groups: "category/image" of each sample; () = unknown. ``mme`` compares the answers on
                one image, within a category.

        Raises:
            ValueError: if there are no samples, the two differ in length, or a sample has no
                reference or an empty one.
        """


class SampleScore(NamedTuple):
    """Strict and lenient score of one sample, 0 to 1, and further numbers by name."""

    strict: float
    lenient: float
    extras: Mapping[str, float] = {}


@dataclass(frozen=True)
class PerSampleScorer:
    """Scorer whose score is the mean over samples.

    Args:
        name: on a card.
        version: name and number of the rule.
        score_sample: scores one prediction that is not empty.
        extras: names of the further numbers that ``score_sample`` gives; an empty prediction has 0.
        reads_question: whether ``score_sample`` takes the sample's question as its third argument.
    """

    name: str
    version: str
    score_sample: Callable[..., SampleScore]
    extras: tuple[str, ...] = ()
    reads_question: bool = False

    def score(
        self,
        answers: Sequence[str],
        references: Sequence[References],
        questions: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> ScoreResult:
        """Score predictions; see ``Scorer``."""
        check_references(answers, references)
        questions = questions or [""] * len(answers)
        scores = [
            SampleScore(0.0, 0.0)
            if is_blank(answer)
            else self.score_sample(answer, right, *([question] if self.reads_question else []))
            for answer, right, question in zip(answers, references, questions, strict=True)
        ]
        strict = [each.strict for each in scores]
        lenient = [max(each.strict, each.lenient) for each in scores]
        extras = {
            name: fmean([each.extras.get(name, 0.0) for each in scores]) for name in self.extras
        }
        return ScoreResult(strict, lenient, fmean(strict), fmean(lenient), extras)


def is_blank(text: str) -> bool:
    """Return whether a text has no visible character."""
    return all(unicodedata.category(letter) in _UNSEEN for letter in text)


def check_references(answers: Sequence[str], references: Sequence[References]) -> None:
    """Check that every prediction has references.

    Raises:
        ValueError: if there are no samples, the two differ in length, or a sample has no reference
            or an empty one.
    """
    if len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} predictions for references of {len(references)} samples: give one for "
            "each sample, an empty text without a prediction"
        )
    if not answers:
        raise ValueError("there are no predictions to score: give at least one")
    for n, right in enumerate(references):
        if isinstance(right, str):
            raise ValueError(f"references of sample {n} are the text {right!r}: give a tuple of it")
        if not right or any(is_blank(text) for text in right):
            raise ValueError(
                f"references of sample {n} are {right!r}: give at least one, none empty"
            )
