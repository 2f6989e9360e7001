"""Scorers of short answers: exact, contains, fraction, VQA and TextVQA accuracy, ANLS.

Each is the mean over samples. A sample's references are alternatives: the best one counts, but for
``vqa``, whose references are the answers of ten annotators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore
from mmcl.evaluation.scorers.text_normalization import (
    has_words,
    occurs,
    plain,
    words,
)

PEOPLE = 10
ANLS_THRESHOLD = 0.5
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_APOSTROPHES = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's i'm i've isn't it'd it'll let's ma'am mightn't might've mustn't "
    "must've needn't o'clock oughtn't shan't she's should've shouldn't somebody'd somebody's "
    "someone'd someone's something'd something's that'd that's there'd there're there's "
    "they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'll who's who've why'll why're why's won't would've "
    "wouldn't y'all you'd you'll you're you've"
)
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
# A point stays only in front of a digit.
_POINT = re.compile(r"\.(?!\d)")


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


def score_vqa(answer: str, references: References) -> SampleScore:
    """VQA accuracy: a prediction is right as far as annotators gave that answer.

    Antol et al. 2015, arXiv:1505.00468, in the form of the official evaluation: min(matches / 3,
    1), averaged over the subsets that leave one of the ten annotators out. So 1, 2, 3 and 4 matches
    of ten score 0.3, 0.6, 0.9 and 1. The official code normalizes the annotators' answers less than
    the model's (punctuation only, and not where all agree); here both are normalized alike, as in
    the evaluation of TextVQA and VizWiz, which is equal for annotations that are lower-case words
    and digits, as VQAv2's are. Lenient: the best annotator's answer that occurs in the prediction
    as whole words.
    """
    return _vqa_score(answer, references, normal)


def score_textvqa(answer: str, references: References) -> SampleScore:
    """VQA accuracy as the evaluation of TextVQA computes it.

    Singh et al. 2019, arXiv:1904.08920; as ``vqa``, with the normalization of EvalAI and LLaVA's
    script: commas and question marks are dropped first, and "'s" becomes a word of its own.
    """
    return _vqa_score(answer, references, normal_textvqa)


def _vqa_score(answer: str, references: References, normalize: Callable[[str], str]) -> SampleScore:
    people = [normalize(right) for right in references]
    prediction = normalize(answer)
    found = [
        people.count(given)
        for given, right in zip(people, references, strict=True)
        if occurs(right, answer) or occurs(given, prediction)
    ]
    strict = vqa_accuracy(people.count(prediction), len(people))
    return SampleScore(strict, vqa_accuracy(max(found, default=0), len(people)))


def score_anls(answer: str, references: References) -> SampleScore:
    """Normalized Levenshtein similarity to the nearest reference, 0 below one half (ANLS).

    Biten et al. 2019, arXiv:1905.13648, as DocVQA's evaluation: without case and surrounding white
    space, 1 - distance / longer length. Lenient: 1 if a right answer occurs as whole words.
    """
    prediction = " ".join(answer.lower().split())
    values = []
    for right in references:
        text = " ".join(right.lower().split())
        values.append(1 - edit_distance(prediction, text) / max(len(prediction), len(text), 1))
    best = max(values)
    is_there = any(occurs(right, answer) for right in references)
    strict = best if best >= ANLS_THRESHOLD else 0.0
    return SampleScore(strict, max(strict, float(is_there)))


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace."""
    row = list(range(len(other) + 1))
    for index, letter in enumerate(one, 1):
        before, row[0] = row[0], index
        for place, wanted in enumerate(other, 1):
            changed = before + (letter != wanted)
            before, row[place] = row[place], min(changed, row[place] + 1, row[place - 1] + 1)
    return row[-1]


def vqa_accuracy(matches: int, people: int) -> float:
    """VQA accuracy of an answer by the number of annotators who gave it.

    Args:
        matches: annotators who gave it.
        people: all annotators; below ``PEOPLE`` one match is enough.
    """
    if people < PEOPLE:
        return float(matches > 0)
    without_a_match = min(matches / 3, 1.0)
    without_a_match_left_out = min((matches - 1) / 3, 1.0) if matches else 0.0
    rest = people - matches
    return (matches * without_a_match_left_out + rest * without_a_match) / people


def normal(text: str) -> str:
    """Normalize an answer as the official evaluation does.

    Case, punctuation and articles are removed, number words become digits, contractions get their
    apostrophe. Where that leaves nothing ("A", "-"), the text is kept, without case.
    """
    kept = " ".join(text.casefold().split())
    has_number_comma = _NUMBER_COMMA.search(kept) is not None
    bare = kept
    for mark in _MARKS:
        is_edge = f"{mark} " in kept or f" {mark}" in kept
        bare = bare.replace(mark, "" if is_edge or has_number_comma else " ")
    bare = _POINT.sub("", bare)
    found = [_NUMBER_WORDS.get(word, word) for word in bare.split() if word not in _ARTICLES]
    return " ".join(_contractions().get(word, word) for word in found) or plain(text)


def normal_textvqa(text: str) -> str:
    """Normalize an answer as TextVQA's evaluation does; see ``normal``."""
    bare = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normal(bare) if bare.strip() else plain(text)


@cache
def _contractions() -> dict[str, str]:
    return {word.replace("'", ""): word for word in _APOSTROPHES.split()}


def _contains(answer: str, right: str) -> bool:
    """Return whether a prediction contains whole words, or equals them if they are punctuation."""
    wanted = words(right)
    return has_words(words(answer), wanted) if wanted else plain(right) == plain(answer)


def _items(text: str) -> set[str]:
    return {item for item in map(plain, text.split(",")) if item} or {plain(text)}


EXACT = PerSampleScorer("exact", "exact/1", score_exact)
CONTAINS = PerSampleScorer("contains", "contains/1", score_contains)
FRACTION = PerSampleScorer("fraction", "fraction/1", score_fraction, ("jaccard",))
VQA = PerSampleScorer("vqa", "vqa/1", score_vqa)
TEXTVQA = PerSampleScorer("textvqa", "textvqa/1", score_textvqa)
ANLS = PerSampleScorer("anls", "anls/1", score_anls)
