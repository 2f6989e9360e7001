"""Scorers of yes/no questions with the metrics that their benchmarks publish: pope and mme.

The lenient score of both counts an answer that says one of "yes" and "no" anywhere, and not the
other, as VLMEvalKit reads it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from mmcl.evaluation.scorers.scorer import References, ScoreResult, check_references, is_blank
from mmcl.evaluation.scorers.text_normalization import plain, words

_LABELS = frozenset(("yes", "no"))
PERCEPTION = frozenset((
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "ocr",
))  # fmt: skip
COGNITION = frozenset((
    "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning",
))  # fmt: skip
Measure = Callable[[Sequence[str], Sequence[str], Sequence[str]], Mapping[str, float]]
"""From labels, predicted labels and groups of the samples to further numbers by name."""


@dataclass(frozen=True)
class YesNoScorer:
    """Scorer of yes/no questions; strict is the published accuracy, lenient reads any form.

    Args:
        name: on a card.
        version: name and number of the rule.
        read: reads a prediction as "yes", "no" or "other", as the published script does.
        measure: makes the published metrics, which become the extras.
    """

    name: str
    version: str
    read: Callable[[str], str]
    measure: Measure

    def score(
        self,
        answers: Sequence[str],
        references: Sequence[References],
        questions: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> ScoreResult:
        """Score predictions; see ``Scorer``.

        Raises:
            ValueError: if a reference is neither "yes" nor "no".
        """
        check_references(answers, references)
        labels = [_label(right, self.name) for right in references]
        predicted = ["other" if is_blank(answer) else self.read(answer) for answer in answers]
        strict = [float(one == other) for one, other in zip(predicted, labels, strict=True)]
        pairs = zip(answers, labels, strict=True)
        anywhere = [float(_LABELS.intersection(words(text)) == {label}) for text, label in pairs]
        lenient = list(map(max, strict, anywhere))
        extras = self.measure(labels, predicted, groups)
        return ScoreResult(strict, lenient, fmean(strict), fmean(lenient), extras)


def read_pope(answer: str) -> str:
    """Read an answer as POPE's and LLaVA's script: "no" for No, no or not in the first sentence.

    Li et al. 2023, arXiv:2305.10355. Everything else is "yes", but an empty prediction, which the
    script counts as "yes", is wrong here.
    """
    found = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"}.intersection(found) else "yes"


def read_mme(answer: str) -> str:
    """Read an answer as MME's script: "yes" or "no" in its first four characters.

    Fu et al. 2023, arXiv:2306.13394.
    """
    start = answer.strip().lower()[:4]
    return next((label for label in ("yes", "no") if label in start), "other")


def measure_pope(
    labels: Sequence[str], predicted: Sequence[str], groups: Sequence[str]
) -> Mapping[str, float]:
    """Accuracy, precision and recall of "yes", F1 and the fraction of "yes", each 0 to 1."""
    pairs = list(zip(labels, predicted, strict=True))
    hits = pairs.count(("yes", "yes"))
    predicted_yes, right_yes = predicted.count("yes"), labels.count("yes")
    precision, recall = hits / max(1, predicted_yes), hits / max(1, right_yes)
    return {
        "accuracy": fmean(float(label == answer) for label, answer in pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / ((precision + recall) or 1.0),
        "yes_ratio": predicted_yes / len(pairs),
    }


def measure_mme(
    labels: Sequence[str], predicted: Sequence[str], groups: Sequence[str]
) -> Mapping[str, float]:
    """MME's accuracy, accuracy+ and score of every category, and their sums.

    Accuracy+ is the fraction of images of which every question (there are two) is answered right. A
    category's score is 100 times the sum of both, ``perception`` and ``cognition`` are sums over
    their categories, ``total`` over all.

    Args:
        labels: of the questions.
        predicted: of the questions.
        groups: "category/image" of the questions; empty where they are unknown, which leaves the
            accuracy alone.
    """
    if not groups:
        return {}
    rights: defaultdict[str, defaultdict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for label, answer, group in zip(labels, predicted, groups, strict=True):
        category, _, image = group.partition("/")
        rights[category][image].append(label == answer)
    values: dict[str, float] = {}
    for category, images in rights.items():
        accuracy = fmean(float(is_right) for answers in images.values() for is_right in answers)
        plus = fmean(float(all(answers)) for answers in images.values())
        values |= {
            f"{category}_accuracy": accuracy,
            f"{category}_accuracy+": plus,
            category: 100 * (accuracy + plus),
        }
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if found := [each for each in rights if each.lower() in members]:
            values[name] = sum(values[each] for each in found)
    return {**values, "total": sum(values[category] for category in rights)}


def _label(references: References, scorer: str) -> str:
    found = {plain(right) for right in references}
    if len(found) != 1 or not found <= _LABELS:
        raise ValueError(
            f"the scorer {scorer} got the reference {references[0]!r}: give yes or no, or score "
            "with exact"
        )
    return found.pop()


POPE = YesNoScorer("pope", "pope/1", read_pope, measure_pope)
MME = YesNoScorer("mme", "mme/1", read_mme, measure_mme)
