"""VQA accuracy: an answer is right as far as people gave it.

Antol et al. 2015, arXiv:1505.00468, in the form of the official evaluation: min(matches / 3, 1),
averaged over the subsets that leave one of the ten people out. So 1, 2, 3 and 4 matches of ten are
worth 0.3, 0.6, 0.9 and 1. The official code normalises people's answers less than the model's
(punctuation only, and not where all agree); here both are normalised alike, as in the evaluation of
TextVQA and VizWiz.
"""

from __future__ import annotations

import re

from mmcl.metrics.scorers.scored import Judged, References, RowScorer
from mmcl.metrics.scorers.words import occurs, plain

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
    """Write an answer as the official evaluation compares it.

    Case, punctuation and articles go, number words become digits, contractions get their
    apostrophe. Where that leaves nothing ("A", "-"), the text stays as it was, without case.
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


def agreement(matches: int, people: int) -> float:
    """Give the accuracy of an answer that so many people gave.

    Args:
        matches: people who gave it.
        people: all of them; below ``PEOPLE`` one match is enough.
    """
    if people < PEOPLE:
        return float(matches > 0)
    without_a_match = min(matches / 3, 1.0)
    without_a_match_left_out = min((matches - 1) / 3, 1.0) if matches else 0.0
    rest = people - matches
    return (matches * without_a_match_left_out + rest * without_a_match) / people


def judge_vqa(answer: str, references: References) -> Judged:
    """Score by how many people gave the answer.

    Lenient: as if the answer were that of the people's answers which occurs in it as whole words
    and is worth most.
    """
    people = [normal(right) for right in references]
    said = normal(answer)
    found = [
        people.count(given)
        for given, right in zip(people, references, strict=True)
        if occurs(right, answer) or occurs(given, said)
    ]
    strict = agreement(people.count(said), len(people))
    return Judged(strict, agreement(max(found, default=0), len(people)))


VQA = RowScorer("vqa", "vqa/1", judge_vqa)
