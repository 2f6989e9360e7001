"""Scorer of grounding answers: four numbers as a bounding box, scored by IoU."""

from __future__ import annotations

import math
import re

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore

HIT = 0.5
Box = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_FOUR = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
_FORMAT = re.compile(rf"\[\s*{_FOUR}\s*\]")
_ANYWHERE = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w]|\.\d)")
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")


def score_box(answer: str, references: References) -> SampleScore:
    """Score a box [x1, y1, x2, y2] by intersection over union, RefCOCO's rule: 0.5 is a hit.

    Boxes are in the unit of the reference (0 to 1, percent, thousandths or pixels). Strict: the
    prediction is the four bracketed numbers alone. Lenient: the four numbers occur anywhere, those
    in brackets first. The extra ``iou`` is the mean IoU of the boxes found. CoIN's scorer needs
    more than 0.5, and cuts the first and the last digit of its own format.

    Raises:
        ValueError: if a reference is not a box.
    """
    boxes = [_reference(right) for right in references]
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


BOX = PerSampleScorer("box", "box/1", score_box, ("iou",))


def _side(start: float, end: float) -> float:
    return max(0.0, end - start)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in _ANYWHERE.findall(text)]


def _reference(text: str) -> Box:
    box = find_box(text)
    if box is None:
        raise ValueError(f"the scorer box got the reference {text!r}: give [x1, y1, x2, y2]")
    return box
