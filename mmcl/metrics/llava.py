"""Answers as LLaVA-style repositories write them, and the test files that say what is right.

Answers are JSON lines with ``question_id`` and ``text`` (``prompt``, ``model_id`` ... beside them).
A test file is a JSON list, or JSON lines, of objects with ``question_id`` (or ``id``) and either
``answer`` (or ``answers``: a text, a number or a list of them) or ``conversations``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.metrics import jsontext
from mmcl.metrics.answers import Answer


@dataclass(frozen=True)
class Joined:
    """Answers beside their truth.

    Args:
        answers: one for every question of the test file, in its order; empty if there was none.
        missing: questions without an answer.
        repeated: questions with several answers, of which the first counts.
        unknown: answers to questions that the test file lacks; they do not count.
    """

    answers: list[Answer]
    missing: list[str]
    repeated: list[str]
    unknown: list[str]


def is_llava(path: Path) -> bool:
    """Say whether the first line of a file is an answer as LLaVA writes it."""
    first = next((line for line in jsontext.read_text(path).split("\n") if line.strip()), "")
    raw = jsontext.parse(first, f"{path} line 1") if first else None
    return isinstance(raw, dict) and "question_id" in raw and "key" not in raw


def join(answers: Path, truth: Path) -> Joined:
    """Put answers beside their truth; every question of the truth counts.

    Args:
        answers: JSON lines.
        truth: test file.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: naming the place, if either holds something else.
    """
    questions = _questions(truth)
    said: dict[str, str] = {}
    repeated: list[str] = []
    for place, raw in _objects(answers):
        name = _name(raw, place)
        if not isinstance(raw.get("text"), str):
            raise ValueError(f"{place} has text {raw.get('text')!r}: expected what the model said")
        if name in said:
            repeated.append(name)
        said.setdefault(name, raw["text"])
    rows = [
        Answer(name, right[0], said.get(name, ""), False, question=question, references=right)
        for name, (question, right) in questions.items()
    ]
    return Joined(
        rows,
        missing=[name for name in questions if name not in said],
        repeated=list(dict.fromkeys(repeated)),
        unknown=[name for name in said if name not in questions],
    )


def _questions(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for place, raw in _objects(path):
        name = _name(raw, place)
        if name in found:
            raise ValueError(
                f"{place} asks question {name!r} again: give every question its own id"
            )
        found[name] = _asked(raw), _right(raw, place)
    if not found:
        raise ValueError(f"{path} holds no question: give the test file of these answers")
    return found


def _objects(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Read a JSON list or JSON lines of objects, each with a name for its place."""
    text = jsontext.read_text(path)
    if text.lstrip().startswith("["):
        raw = jsontext.parse(text, str(path))
        parts = [(f"{path} entry {n}", each) for n, each in enumerate(raw, 1)]  # type: ignore[arg-type,var-annotated]
    else:
        lines = [(f"{path} line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
        parts = [(place, jsontext.parse(line, place)) for place, line in lines if line.strip()]
    for place, each in parts:
        if not isinstance(each, dict):
            raise ValueError(f"{place} is {type(each).__name__}: expected an object")
    return parts


def _name(raw: Mapping[str, Any], place: str) -> str:
    name = raw.get("question_id", raw.get("id"))
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"{place} has question_id {name!r}: expected a number or a text")
    return str(name)


def _asked(raw: Mapping[str, Any]) -> str:
    turns = [turn for turn in _turns(raw) if turn.get("from") != "gpt"]
    asked = turns[-1].get("value") if turns else raw.get("text")
    return asked.replace("<image>", "").strip() if isinstance(asked, str) else ""


def _right(raw: Mapping[str, Any], place: str) -> tuple[str, ...]:
    right = raw.get("answer", raw.get("answers"))
    if right is None:
        right = [turn.get("value") for turn in _turns(raw) if turn.get("from") == "gpt"][-1:]
    # Four numbers are one box, any other list holds alternatives.
    is_box = isinstance(right, list) and len(right) == 4 and all(map(jsontext.is_number, right))
    alternatives = right if isinstance(right, list) and not is_box else [right]
    texts = [str(right)] if is_box else [_text(each) for each in alternatives]
    if not texts or not all(texts):
        raise ValueError(
            f"{place} has no right answer: expected 'answer' (a text or a list of texts) or "
            "'conversations' that end with what gpt says"
        )
    return tuple(texts)


def _text(value: object) -> str:
    """Read a text or a number; VQA's lists hold {"answer": text} for each person."""
    if isinstance(value, dict):
        value = value.get("answer")
    is_plain = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value) if is_plain else ""


def _turns(raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    turns = raw.get("conversations")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
