"""Predictions of a model: one JSON line per test sample of one cell of the accuracy matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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


def rescore(
    answers: Sequence[Prediction], scorer: Scorer, groups: Sequence[str] = ()
) -> tuple[list[Prediction], ScoreResult]:
    """Score predictions, again if they were scored before.

    Args:
        answers: the predictions.
        scorer: of all of them.
        groups: "category/image" of each, see ``Scorer.score``; () = unknown.

    Returns:
        the predictions with their strict and lenient scores, correct from a strict score of 0.5 on,
        and the scores of all of them together.

    Raises:
        ValueError: if there are none, or one has an empty right answer.
    """
    predictions = [answer.text for answer in answers]
    references = [answer.right_answers for answer in answers]
    questions = [answer.question for answer in answers]
    found = scorer.score(predictions, references, questions, groups)
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
