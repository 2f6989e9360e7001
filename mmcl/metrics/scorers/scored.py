"""What a scorer takes and gives, and the one loop for scorers that judge row by row."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

References = tuple[str, ...]

# Separators and control or format characters (zero-width ones too) show nothing on a page.
_UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")


@dataclass(frozen=True)
class Scored:
    """Scores of some answers, all in 0 to 1.

    Args:
        strict_rows: one per answer, with the form that the question asked for.
        lenient_rows: one per answer, at least the strict one: the right answer is there, whatever
            the form. Lenient without strict is a format lost, neither is knowledge lost.
        strict: of all answers; the mean of the rows unless the scorer says otherwise.
        lenient: of all answers, at least ``strict``.
        extras: further numbers by name, such as ``iou``; not bound to 0 to 1.
    """

    strict_rows: list[float]
    lenient_rows: list[float]
    strict: float
    lenient: float
    extras: Mapping[str, float] = field(default_factory=dict)


class Scorer(Protocol):
    """Turns answers and what is right into numbers; an empty answer is worth 0."""

    @property
    def name(self) -> str:
        """Name on a card, such as ``exact``."""

    @property
    def version(self) -> str:
        """Name and the number of the rule, such as ``exact/1``; another rule, another number."""

    def score(self, answers: Sequence[str], references: Sequence[References]) -> Scored:
        """Score answers.

        Args:
            answers: what was said, one per row.
            references: every right answer of each row, in the same order.

        Raises:
            ValueError: if there are no rows, the two differ in length, or a row has no reference
                or an empty one.
        """


class Judged(NamedTuple):
    """One answer's scores, 0 to 1, and further numbers by name."""

    strict: float
    lenient: float
    extras: Mapping[str, float] = {}


@dataclass(frozen=True)
class RowScorer:
    """A scorer whose score is the mean of its rows.

    Args:
        name: on a card.
        version: name and number of the rule.
        judge: gives the scores of one answer that is not empty.
        extras: names of the further numbers that ``judge`` gives; an empty answer has 0.
    """

    name: str
    version: str
    judge: Callable[[str, References], Judged]
    extras: tuple[str, ...] = ()

    def score(self, answers: Sequence[str], references: Sequence[References]) -> Scored:
        """Score answers; see ``Scorer``."""
        check_rows(answers, references)
        rows = [
            Judged(0.0, 0.0) if is_blank(said) else self.judge(said, right)
            for said, right in zip(answers, references, strict=True)
        ]
        strict = [row.strict for row in rows]
        lenient = [max(row.strict, row.lenient) for row in rows]
        extras = {name: mean([row.extras.get(name, 0.0) for row in rows]) for name in self.extras}
        return Scored(strict, lenient, mean(strict), mean(lenient), extras)


def is_blank(text: str) -> bool:
    """Say whether nothing of a text can be seen."""
    return all(unicodedata.category(letter) in _UNSEEN for letter in text)


def check_rows(answers: Sequence[str], references: Sequence[References]) -> None:
    """Check that every answer can be scored.

    Raises:
        ValueError: if there are no rows, the two differ in length, or a row has no reference or an
            empty one.
    """
    if len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers for {len(references)} rows of references: give one for each "
            "row, an empty text where nothing was said"
        )
    if not answers:
        raise ValueError("there are no answers to score: give at least one row")
    for row, right in enumerate(references):
        if isinstance(right, str):
            raise ValueError(f"references of row {row} are the text {right!r}: give a tuple of it")
        if not right or any(is_blank(text) for text in right):
            raise ValueError(
                f"references of row {row} are {right!r}: give at least one right answer, none empty"
            )


def mean(values: Sequence[float]) -> float:
    """Average values with one rounding, in any order the same."""
    return math.fsum(values) / len(values)
