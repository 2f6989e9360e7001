"""What a model said: one line per test sample of one cell of the matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mmcl.core.atomic import write_atomic
from mmcl.metrics import jsontext


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        key: the sample's key in its shard.
        truth: the right answer, such as the class name.
        answer: what the model said.
        correct: whether that counts as right.
        score: what the model gave its answer (probability, logit), None if it gives none.
    """

    key: str
    truth: str
    answer: str
    correct: bool
    score: float | None = None


_KEYS = tuple(field.name for field in fields(Answer))


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


def _line(answer: Answer) -> bytes:
    if answer.score is not None and not math.isfinite(answer.score):
        raise ValueError(f"score of {answer.key!r} is {answer.score}: give a finite number or None")
    return jsontext.to_bytes(asdict(answer), indent=None)


def _answer(line: str, place: str) -> Answer:
    raw = jsontext.parse(line, place)
    if not isinstance(raw, dict) or set(raw) != set(_KEYS):
        raise ValueError(f"{place} is no answer: expected an object with {', '.join(_KEYS)}")
    for key in ("key", "truth", "answer"):
        if not isinstance(raw[key], str):
            raise ValueError(f"{place}: {key!r} is {json.dumps(raw[key])}, expected a string")
    if not isinstance(raw["correct"], bool):
        raise ValueError(f"{place}: 'correct' is {json.dumps(raw['correct'])}, expected a boolean")
    score = raw["score"]
    if score is not None and not jsontext.is_number(score):
        raise ValueError(f"{place}: 'score' is {json.dumps(score)}, expected a number or null")
    value = None if score is None else float(score)
    return Answer(raw["key"], raw["truth"], raw["answer"], raw["correct"], value)
