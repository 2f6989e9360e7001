"""Predictions of a model: one JSON line per test sample of one cell of the accuracy matrix.

Predictions in LLaVA's file format are read too: JSON lines with ``question_id`` and ``text``. Their
test file is a JSON list, or JSON lines, of objects with ``question_id`` (or ``id``) and either
``answer`` (or ``answers``: a text, a number or a list of them) or ``conversations``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation import strict_json
from mmcl.evaluation.scorers import Scorer, ScoreResult

ANSWERS = "answers"  # folder of a run directory
# Scorers give fractions; a strict score from here on counts as correct.
RIGHT_FROM = 0.5


@dataclass(frozen=True)
class Prediction:
    """Prediction for one test sample.

    Args:
        key: the sample's key in its shard.
        target: the right answer, such as the class name.
        text: the model's prediction.
        correct: whether it counts as right.
        score: the model's score of its prediction (probability, logit), None without one.
        question: of the sample, empty where all samples of the task have the same.
        references: every right answer, empty if ``target`` is the only one.
        lenient: score in any form, 0 to 1, None without a scorer.
        strict: score in the requested form, 0 to 1, None without a scorer.
    """

    key: str
    target: str
    text: str
    correct: bool
    score: float | None = None
    question: str = ""
    references: tuple[str, ...] = ()
    lenient: float | None = None
    strict: float | None = None

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All right answers as they were given, repeats included."""
        return self.references or (self.target,)


# Left out of the file at their default, so that predictions of a classifier stay short.
_OPTIONAL = ("question", "references", "lenient", "strict")


def predictions_path(folder: Path, row: int, column: int) -> Path:
    """File of the predictions of one cell of a run's matrix."""
    return folder / ANSWERS / f"row_{row:02d}" / f"col_{column:02d}.jsonl"


def write_predictions(path: Path, answers: Iterable[Prediction]) -> None:
    """Write predictions atomically, one JSON line each, in the order given.

    Raises:
        ValueError: if a score is not finite.
    """
    write_atomic(path, b"".join(_line(answer) for answer in answers))


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file of predictions.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the line, if one is not a prediction.
    """
    # Not splitlines(): a prediction may hold U+2028 and the like, which JSON does not escape.
    lines = strict_json.read_text(path).split("\n")
    named = [(line, f"{path} line {number}") for number, line in enumerate(lines, 1) if line]
    parsed = [(strict_json.parse(line, name), name) for line, name in named]
    return [strict_json.load(Prediction, raw, name, _OPTIONAL) for raw, name in parsed]


def accuracy(answers: Sequence[Prediction]) -> float | None:
    """Fraction of predictions that are correct, None if there are none."""
    return sum(answer.correct for answer in answers) / len(answers) if answers else None


def rescore(answers: Sequence[Prediction], scorer: Scorer) -> tuple[list[Prediction], ScoreResult]:
    """Score predictions, again if they were scored before.

    Returns:
        the predictions with their strict and lenient scores, correct from a strict score of 0.5 on,
        and the scores of all of them together.

    Raises:
        ValueError: if there are none, or one has an empty right answer.
    """
    predictions = [answer.text for answer in answers]
    found = scorer.score(predictions, [answer.right_answers for answer in answers])
    scores = zip(answers, found.strict_scores, found.lenient_scores, strict=True)
    graded = [
        replace(answer, strict=strict, lenient=lenient, correct=strict >= RIGHT_FROM)
        for answer, strict, lenient in scores
    ]
    return graded, found


def _line(answer: Prediction) -> bytes:
    plain = asdict(answer)
    left_out = [key for key in _OPTIONAL if plain[key] == getattr(Prediction, key)]
    kept = {key: value for key, value in plain.items() if key not in left_out}
    try:
        return strict_json.to_bytes(kept, indent=None)
    except ValueError as error:
        raise ValueError(
            f"a score of {answer.key!r} is not finite ({error}): give a finite number or None"
        ) from None


@dataclass(frozen=True)
class JoinedPredictions:
    """Predictions joined with the right answers of a test file.

    Args:
        answers: one for every question of the test file, in its order; empty text if missing.
        missing: questions without a prediction.
        repeated: questions with several predictions, of which the first counts.
        unknown: predictions for questions that the test file lacks; they do not count.
    """

    answers: list[Prediction]
    missing: list[str]
    repeated: list[str]
    unknown: list[str]


def is_llava(path: Path) -> bool:
    """Return whether the first line of a file is a prediction in LLaVA's format."""
    first = next((line for line in strict_json.read_text(path).split("\n") if line.strip()), "")
    raw = strict_json.parse(first, f"{path} line 1") if first else None
    return isinstance(raw, dict) and "question_id" in raw and "key" not in raw


def join_llava(answers: Path, truth: Path) -> JoinedPredictions:
    """Join predictions with the right answers of a test file; all its questions count.

    Args:
        answers: JSON lines.
        truth: test file.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: naming the line or entry, if a file has another format.
    """
    questions = _questions(truth)
    texts: dict[str, str] = {}
    repeated: list[str] = []
    for where, raw in _objects(answers):
        name = _name(raw, where)
        if not isinstance(raw.get("text"), str):
            raise ValueError(f"{where} has text {raw.get('text')!r}: expected the prediction")
        if name in texts:
            repeated.append(name)
        texts.setdefault(name, raw["text"])
    joined = [
        Prediction(name, right[0], texts.get(name, ""), False, question=question, references=right)
        for name, (question, right) in questions.items()
    ]
    return JoinedPredictions(
        joined,
        missing=[name for name in questions if name not in texts],
        repeated=list(dict.fromkeys(repeated)),
        unknown=[name for name in texts if name not in questions],
    )


def _questions(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for where, raw in _objects(path):
        name = _name(raw, where)
        if name in found:
            raise ValueError(f"{where} repeats question {name!r}: give every question its own id")
        found[name] = _question(raw), _right(raw, where)
    if not found:
        raise ValueError(f"{path} holds no question: give the test file of these predictions")
    return found


def _objects(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Read a JSON list or JSON lines of objects, each with its line or entry for errors."""
    text = strict_json.read_text(path)
    if text.lstrip().startswith("["):
        raw = strict_json.parse(text, str(path))
        found = [(f"{path} entry {n}", each) for n, each in enumerate(raw, 1)]  # type: ignore[arg-type,var-annotated]
    else:
        lines = [(f"{path} line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
        found = [(where, strict_json.parse(line, where)) for where, line in lines if line.strip()]
    for where, each in found:
        if not isinstance(each, dict):
            raise ValueError(f"{where} is {type(each).__name__}: expected an object")
    return found


def _name(raw: Mapping[str, Any], where: str) -> str:
    name = raw.get("question_id", raw.get("id"))
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"{where} has question_id {name!r}: expected a number or a text")
    return str(name)


def _question(raw: Mapping[str, Any]) -> str:
    turns = [turn for turn in _turns(raw) if turn.get("from") != "gpt"]
    question = turns[-1].get("value") if turns else raw.get("text")
    return question.replace("<image>", "").strip() if isinstance(question, str) else ""


def _right(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    right = raw.get("answer", raw.get("answers"))
    if right is None:
        right = [turn.get("value") for turn in _turns(raw) if turn.get("from") == "gpt"][-1:]
    # Four numbers are one box, any other list holds alternatives.
    is_box = isinstance(right, list) and len(right) == 4 and all(map(strict_json.is_number, right))
    alternatives = right if isinstance(right, list) and not is_box else [right]
    texts = [str(right)] if is_box else [_text(each) for each in alternatives]
    if not texts or not all(texts):
        raise ValueError(
            f"{where} has no right answer: expected 'answer' (a text or a list of texts) or "
            "'conversations' that end with a turn of gpt"
        )
    return tuple(texts)


def _text(value: object) -> str:
    """Read a text or a number; VQA's lists hold {"answer": text} per annotator."""
    if isinstance(value, dict):
        value = value.get("answer")
    is_scalar = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value) if is_scalar else ""


def _turns(raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    turns = raw.get("conversations")
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
