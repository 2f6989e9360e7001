"""VQA accuracy: a prediction is right as far as annotators gave that answer.

Antol et al. 2015, arXiv:1505.00468, in the form of the official evaluation: min(matches / 3, 1),
averaged over the subsets that leave one of the ten annotators out. So 1, 2, 3 and 4 matches of ten
score 0.3, 0.6, 0.9 and 1. The official code normalizes the annotators' answers less than the
model's (punctuation only, and not where all agree); here both are normalized alike, as in the
evaluation of TextVQA and VizWiz.
"""

from __future__ import annotations

import re

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore
from mmcl.evaluation.scorers.text_normalization import occurs, plain

PEOPLE = 10
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
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
_CONTRACTIONS = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBER_COMMA = re.compile(r"\d,\d")
# A point stays only in front of a digit.
_POINT = re.compile(r"\.(?!\d)")


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
    found = [_NUMBERS.get(word, word) for word in bare.split() if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in found) or plain(text)


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


def score_vqa(answer: str, references: References) -> SampleScore:
    """VQA accuracy of a prediction.

    Lenient: of the best annotator's answer that occurs in the prediction as whole words.
    """
    people = [normal(right) for right in references]
    prediction = normal(answer)
    found = [
        people.count(given)
        for given, right in zip(people, references, strict=True)
        if occurs(right, answer) or occurs(given, prediction)
    ]
    strict = vqa_accuracy(people.count(prediction), len(people))
    return SampleScore(strict, vqa_accuracy(max(found, default=0), len(people)))


VQA = PerSampleScorer("vqa", "vqa/1", score_vqa)
