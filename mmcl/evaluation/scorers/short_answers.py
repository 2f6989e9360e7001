"""Scorers of short answers: exact, contains, fraction, option, VQA accuracy, boxes.

Each is the mean over samples. A sample's references are alternatives: the best one counts, but for
``vqa``, whose references are the answers of ten annotators.
"""

from __future__ import annotations

import math
import re
from functools import cache

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

PEOPLE = 10
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

HIT = 0.5
Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_FOUR = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
_FORMAT = re.compile(rf"\[\s*{_FOUR}\s*\]")
_ANYWHERE = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w]|\.\d)")
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")


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


def score_vqa(answer: str, references: References) -> SampleScore:
    """VQA accuracy: a prediction is right as far as annotators gave that answer.

    Antol et al. 2015, arXiv:1505.00468, in the form of the official evaluation: min(matches / 3,
    1), averaged over the subsets that leave one of the ten annotators out. So 1, 2, 3 and 4 matches
    of ten score 0.3, 0.6, 0.9 and 1. The official code normalizes the annotators' answers less than
    the model's (punctuation only, and not where all agree); here both are normalized alike, as in
    the evaluation of TextVQA and VizWiz. Lenient: the best annotator's answer that occurs in the
    prediction as whole words.
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


@cache
def _contractions() -> dict[str, str]:
    return {word.replace("'", ""): word for word in _APOSTROPHES.split()}


def score_box(answer: str, references: References) -> SampleScore:
    """Score a box [x1, y1, x2, y2] by intersection over union, RefCOCO's rule: 0.5 is a hit.

    Boxes are in the unit of the reference (0 to 1, percent, thousandths or pixels). Strict: the
    prediction is the four bracketed numbers alone. Lenient: the four numbers occur anywhere, those
    in brackets first. The extra ``iou`` is the mean IoU of the boxes found. CoIN's scorer needs
    more than 0.5, and cuts the first and the last digit of its own format.

    Raises:
        ValueError: if a reference is not a box.
    """
    boxes = []
    for right in references:
        box = find_box(right)
        if box is None:
            raise ValueError(f"the scorer box got the reference {right!r}: give [x1, y1, x2, y2]")
        boxes.append(box)
    predicted = find_box(answer)
    best = max(iou(predicted, box) for box in boxes) if predicted is not None else 0.0
    is_hit = best >= HIT
    is_formal = _FORMAT.fullmatch(answer.strip()) is not None
    return SampleScore(float(is_hit and is_formal), float(is_hit), {"iou": best})


def find_box(text: str) -> Box | None:
    """Find a box in a text: four finite numbers in one pair of brackets, else the first four.

    Returns:
        x1, y1, x2, y2 as written, None if there are not four.
    """
    inside = [_numbers(each) for each in _BRACKETS.findall(text)]
    found = next((numbers for numbers in inside if len(numbers) == 4), _numbers(text)[:4])
    if len(found) < 4 or not all(map(math.isfinite, found)):
        return None
    return found[0], found[1], found[2], found[3]


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 if either has no area or its corners are swapped."""
    areas = [_side(box[0], box[2]) * _side(box[1], box[3]) for box in (one, other)]
    width = _side(max(one[0], other[0]), min(one[2], other[2]))
    height = _side(max(one[1], other[1]), min(one[3], other[3]))
    shared = width * height
    union = areas[0] + areas[1] - shared
    return shared / union if min(areas) > 0 and math.isfinite(union) else 0.0


def _side(start: float, end: float) -> float:
    return max(0.0, end - start)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _ANYWHERE.findall(text)]


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


EXACT = PerSampleScorer("exact", "exact/1", score_exact)
CONTAINS = PerSampleScorer("contains", "contains/1", score_contains)
FRACTION = PerSampleScorer("fraction", "fraction/1", score_fraction, ("jaccard",))
OPTION = PerSampleScorer("option", "option/1", score_option)
VQA = PerSampleScorer("vqa", "vqa/1", score_vqa)
BOX = PerSampleScorer("box", "box/1", score_box, ("iou",))
