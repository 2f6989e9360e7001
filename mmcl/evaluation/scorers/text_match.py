"""Scorers of short answers by text match: exact, contains, fraction, option.

Each is the mean over samples. A sample's references are alternatives: the best one counts.
"""

from __future__ import annotations

import re

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore
from mmcl.evaluation.scorers.text_normalization import (
    has_words,
    occurs,
    option_letter,
    plain,
    words,
)

_OPTION = re.compile(r"\W*([A-Za-z])\W*")
_IN_FRONT = re.compile(r"([A-Z])(?:\.(?:\s.*)?)?", re.DOTALL)
_IN_A_SENTENCE = re.compile(r"\b[Tt]he answer is ([A-Z])\b")


def score_exact(answer: str, references: References) -> SampleScore:
    """Exact match without case, surrounding white space and one final full stop.

    The rule of UCIT (ImageNet-R, ArxivQA, IconQA, CLEVR-Math) and of MLLM-DCL (finance). CoIN's
    scorer for ImageNet takes a substring in either direction, so that an empty answer is right;
    this one does not. Lenient: the right answer occurs as whole words, or as the option letter.
    """
    prediction = plain(answer)
    strict = any(prediction == plain(right) for right in references)
    return SampleScore(float(strict), float(any(occurs(right, answer) for right in references)))


def score_contains(answer: str, references: References) -> SampleScore:
    """Look for the right answer inside the prediction; MLLM-DCL's rule for medicine.

    Strict: as whole words, so that "no" is not found in "normal". Lenient: as a substring without
    case, which is what the released code counts.
    """
    strict = any(_contains(answer, right) for right in references)
    prediction = plain(answer)
    return SampleScore(
        float(strict), float(any(plain(right) in prediction for right in references))
    )


def score_fraction(answer: str, references: References) -> SampleScore:
    """Fraction of a comma-separated right list that was predicted; MLLM-DCL's rule for maps.

    As in the released code an item too many costs nothing; the extra ``jaccard`` (items in both /
    items in either) shows it. Lenient: fraction of the right items that occur as whole words.
    """
    predicted = _items(answer)
    scores = []
    for right in references:
        wanted = _items(right)
        shared = len(wanted & predicted)
        found = sum(_contains(answer, item) for item in wanted)
        extras = {"jaccard": shared / len(wanted | predicted)}
        scores.append(SampleScore(shared / len(wanted), found / len(wanted), extras))
    return max(scores, key=lambda each: (each.strict, each.lenient, each.extras["jaccard"]))


def score_option(answer: str, references: References) -> SampleScore:
    """Compare the option letter of a multiple choice; ScienceQA's rule.

    Strict, as LLaVA's scorer reads it: the letter alone (here also with a full stop), the letter
    and ". " in front of a text, or "The answer is B", once. Lenient: any sentence that chooses one
    letter. A prediction without a letter is wrong; no letter is drawn at random.

    Raises:
        ValueError: if a reference is not a letter.
    """
    wanted = [_option(right) for right in references]
    in_front = _IN_FRONT.fullmatch(answer.strip())
    letters = [in_front[1]] if in_front is not None else _IN_A_SENTENCE.findall(answer)
    strict = len(letters) == 1 and letters[0] in wanted
    return SampleScore(float(strict), float(option_letter(answer) in wanted))


EXACT = PerSampleScorer("exact", "exact/1", score_exact)
CONTAINS = PerSampleScorer("contains", "contains/1", score_contains)
FRACTION = PerSampleScorer("fraction", "fraction/1", score_fraction, ("jaccard",))
OPTION = PerSampleScorer("option", "option/1", score_option)


def _contains(answer: str, right: str) -> bool:
    """Return whether a prediction contains whole words, or equals them if they are punctuation."""
    wanted = words(right)
    return has_words(words(answer), wanted) if wanted else plain(right) == plain(answer)


def _items(text: str) -> set[str]:
    return {item for item in map(plain, text.split(",")) if item} or {plain(text)}


def _option(reference: str) -> str:
    found = _OPTION.fullmatch(reference)
    if found is None:
        raise ValueError(
            f"the scorer option got the reference {reference!r}: give one letter, "
            "or score with exact"
        )
    return found[1].upper()
