"""What a model said: one line per test sample of one cell of the matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmcl.core.atomic import write_atomic
from mmcl.metrics import jsontext
from mmcl.metrics.scorers import Scored, Scorer

# What counts as right where a scorer gives parts of a point.
RIGHT_FROM = 0.5


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        key: the sample's key in its shard.
        truth: the right answer, such as the class name.
        answer: what the model said.
        correct: whether that counts as right.
        score: what the model gave its answer (probability, logit), None if it gives none.
        question: what was asked, empty where the task asks the same of every sample.
        references: every right answer, empty if ``truth`` is the only one.
        lenient: score whatever the form of the answer, 0 to 1, None without a scorer.
        strict: score of an answer in the form asked for, 0 to 1, None without a scorer.
    """

    key: str
    truth: str
    answer: str
    correct: bool
    score: float | None = None
    question: str = ""
    references: tuple[str, ...] = ()
    lenient: float | None = None
    strict: float | None = None

    @property
    def right_answers(self) -> tuple[str, ...]:
        """Every right answer as it was given, repeats included."""
        return self.references or (self.truth,)


_KEYS = ("key", "truth", "answer", "correct", "score")
# Written only where they say something, so that answers of a classifier stay short.
_OPTIONAL = {field.name: field.default for field in fields(Answer) if field.name not in _KEYS}
_NUMBERS = ("score", "lenient", "strict")


def answers_path(folder: Path, row: int, column: int) -> Path:
    """Say where a run folder keeps the answers of one cell."""
    return folder / "answers" / f"row_{row:02d}" / f"col_{column:02d}.jsonl"


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write one JSON line per answer, in the order given, all of the file or nothing.

    Raises:
        ValueError: if a score is not finite.
    """
    write_atomic(path, b"".join(_line(answer) for answer in answers))


def read_answers(path: Path) -> list[Answer]:
    """Read a file of answers.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the line, if one is not an answer.
    """
    # Not splitlines(): an answer may hold U+2028 and the like, which JSON leaves as they are.
    lines = jsontext.read_text(path).split("\n")
    return [_answer(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line]


def accuracy(answers: Sequence[Answer]) -> float | None:
    """Share of answers that are right, None if there are none."""
    return sum(answer.correct for answer in answers) / len(answers) if answers else None


def grade(answers: Sequence[Answer], scorer: Scorer) -> tuple[list[Answer], Scored]:
    """Score answers, again if they were scored before.

    Returns:
        the answers with their strict and lenient scores, right from a strict score of 0.5 on, and
        the scores of all of them together.

    Raises:
        ValueError: if there are none, or one has an empty right answer.
    """
    said = [answer.answer for answer in answers]
    found = scorer.score(said, [answer.right_answers for answer in answers])
    rows = zip(answers, found.strict_rows, found.lenient_rows, strict=True)
    graded = [
        replace(answer, strict=strict, lenient=lenient, correct=strict >= RIGHT_FROM)
        for answer, strict, lenient in rows
    ]
    return graded, found


def _line(answer: Answer) -> bytes:
    for name in _NUMBERS:
        value = getattr(answer, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} of {answer.key!r} is {value}: give a finite number or None")
    plain = asdict(answer)
    kept = {key: plain[key] for key in plain if key in _KEYS or plain[key] != _OPTIONAL[key]}
    return jsontext.to_bytes(kept, indent=None)


def _answer(line: str, place: str) -> Answer:
    raw = jsontext.parse(line, place)
    if not isinstance(raw, dict) or not set(_KEYS) <= set(raw) <= {*_KEYS, *_OPTIONAL}:
        raise ValueError(
            f"{place} is no answer: expected an object with {', '.join(_KEYS)}, and perhaps "
            f"{', '.join(_OPTIONAL)}"
        )
    for key in raw:
        if not _is_good(key, raw[key]):
            given = json.dumps(raw[key])
            raise ValueError(f"{place}: {key!r} is {given}, expected {_expected(key)}")
    numbers = {key: float(raw[key]) for key in _NUMBERS if raw.get(key) is not None}
    return Answer(**{**raw, **numbers, "references": tuple(raw.get("references", ()))})


def _expected(key: str) -> str:
    if key in _NUMBERS:
        return "a number or null"
    return {"correct": "a boolean", "references": "a list of strings"}.get(key, "a string")


def _is_good(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        return value is None or jsontext.is_number(value)
    if key == "correct":
        return isinstance(value, bool)
    return jsontext.is_text_list(value) if key == "references" else isinstance(value, str)
