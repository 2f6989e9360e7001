"""Boxes of grounding answers in the forms that models write, and the scorer ``box``.

=====================================================  ==================================
form                                                   unit
=====================================================  ==================================
``[x1, y1, x2, y2]``, four numbers anywhere            1 if all are fractions, else open
``(x1,y1),(x2,y2)``, ``[[x1, y1, x2, y2]]``            the same, but 1000 for whole numbers
``<|box_start|>...<|box_end|>``, ``<box>...</box>``,   1 if all are fractions, else 1000
``<|det|>...<|/det|>``, ``<|begin_of_box|>...``
``<loc0123>`` four times, y first (PaliGemma)          1024
``<loc_123>`` four times, x first (Florence-2)         1000
``{"bbox_2d": [x1, y1, x2, y2]}`` (Qwen2.5-VL)         open
``{"box_2d": [y1, x1, y2, x2]}`` (Gemini, Gemma)       1000
four numbers with percent signs                        100
=====================================================  ==================================

The unit is what a side of the image measures. Where a form leaves it open, it is pixels, percent or
thousandths, and boxes of such forms are compared as they are written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmcl.evaluation.scorers.scorer import PerSampleScorer, References, SampleScore

HIT = 0.5
Sides = tuple[float, float, float, float]

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)"
_ANYWHERE = re.compile(rf"(?<![\w.]){_NUMBER}(?![\w]|\.\d)")
_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_TWO = rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*"
_PAIR = re.compile(rf"\({_TWO}\)\s*,?\s*\({_TWO}\)")
_DOUBLE = re.compile(rf"\[\s*\[{_TWO},{_TWO}\]\s*\]")
_CORNERS = re.compile(rf"\[{_TWO}\]\s*,?\s*\[{_TWO}\]")
_MARKED = re.compile(
    r"(?:<\|box_start\|>|<box>|<\|det\|>|<\|begin_of_box\|>)([^<]*)"
    r"(?:<\|box_end\|>|</box>|<\|/det\|>|<\|end_of_box\|>)"
)
_LOC = re.compile(r"\s*".join([r"<loc(\d{4})>"] * 4))
_LOC_X_FIRST = re.compile(r"\s*".join([r"<loc_(\d+)>"] * 4))
_Y_FIRST = re.compile(rf"\bbox_2d\W*\[{_TWO},{_TWO}\]")
_PERCENT = re.compile(rf"{_NUMBER}\s*%" + rf"[^\d%]{{0,20}}{_NUMBER}\s*%" * 3)
_LOC_NUMBER = re.compile(r"(?<=<loc)_?\d+(?=>)")
_NAME = re.compile(
    r"<\|object_ref_start\|>[^<]*<\|object_ref_end\|>|<ref>[^<]*</ref>|<\|ref\|>[^<]*<\|/ref\|>"
    r'|,?\s*"label"\s*:\s*"[^"]*"|```(?:json)?'
)
"""Name of the object beside a box, which is not part of the box's form."""
# A box that is wider than its unit by this factor was not written in it.
_BEYOND = 1.5


@dataclass(frozen=True)
class Box:
    """Box of a text.

    Args:
        sides: x1, y1, x2, y2 as written.
        unit: what a side of the image measures; None where the form leaves it open.
        is_stated: whether the form states the unit, rather than the habit of models.
    """

    sides: Sides
    unit: float | None = None
    is_stated: bool = False


def score_box(answer: str, references: References) -> SampleScore:
    """Score a box by intersection over union, RefCOCO's rule: 0.5 is a hit.

    Prediction and reference may differ in form where both units are known, see the module. A
    prediction of open unit is read in the reference's. Strict: the prediction has the form of a
    reference, with other numbers, and nothing beside it. Lenient: the box occurs in any form. The
    extra ``iou`` is the mean IoU of the boxes found, ``unscaled`` the fraction of predictions whose
    unit cannot be compared with the reference's; they count 0. CoIN's scorer needs more than 0.5,
    and cuts the first and the last digit of its own format.

    Raises:
        ValueError: if a reference is not a box.
    """
    boxes = []
    for right in references:
        box = find_box(right)
        if box is None:
            raise ValueError(
                f"the scorer box got the reference {right!r}: give [x1, y1, x2, y2], or another "
                "form of four numbers"
            )
        boxes.append(box)
    predicted = find_box(answer)
    if predicted is None:
        return SampleScore(0.0, 0.0, {"iou": 0.0, "unscaled": 0.0})
    values = [box_iou(predicted, box) for box in boxes]
    best = max((value for value in values if value is not None), default=0.0)
    is_hit, form = best >= HIT, box_form(answer)
    is_formal = any(form == box_form(right) for right in references)
    extras = {"iou": best, "unscaled": float(all(value is None for value in values))}
    return SampleScore(float(is_hit and is_formal), float(is_hit), extras)


def find_box(text: str) -> Box | None:
    """Find the first box in a text: in one of the forms of the module, else the first four numbers.

    Returns:
        the box, None if there are not four finite numbers.
    """
    for find in _FINDERS:
        box = find(text)
        if box is not None:
            return box if all(map(math.isfinite, box.sides)) else None
    return None


def box_iou(predicted: Box, right: Box) -> float | None:
    """IoU of two boxes in one unit, 0 to 1; None if their units cannot be compared."""
    if predicted.sides == right.sides and predicted.unit == right.unit:
        return 1.0
    units = (predicted.unit, right.unit)
    if units[0] is not None and units[1] is not None:
        one, other = (
            tuple(side / unit for side in box.sides)
            for box, unit in ((predicted, units[0]), (right, units[1]))
        )
        return iou(one, other)  # type: ignore[arg-type]
    if units[0] is None and units[1] is not None:
        is_other = max(predicted.sides) > _BEYOND * units[1]
        return None if is_other else iou(predicted.sides, right.sides)
    # [0, 0, 1, 1] is the whole image where predictions are fractions.
    if predicted.is_stated and not (units[0] == 1 and max(right.sides) <= 1):
        return None
    return iou(predicted.sides, right.sides)


def box_form(text: str) -> str:
    """Return the form of a text with a box: its characters without numbers and object names."""
    kept = _LOC_NUMBER.sub("#", _NAME.sub("", text))
    return "".join(_ANYWHERE.sub("#", kept).split()).casefold()


def iou(one: Sides, other: Sides) -> float:
    """Intersection over union of two boxes, 0 if either has no area or its corners are swapped."""
    areas = [_side(box[0], box[2]) * _side(box[1], box[3]) for box in (one, other)]
    width = _side(max(one[0], other[0]), min(one[2], other[2]))
    height = _side(max(one[1], other[1]), min(one[3], other[3]))
    shared = width * height
    union = areas[0] + areas[1] - shared
    return shared / union if min(areas) > 0 and math.isfinite(union) else 0.0


def _side(start: float, end: float) -> float:
    return max(0.0, end - start)


def _box(numbers: Sequence[str], unit: float | None = None, is_stated: bool = False) -> Box:
    """Make a box of four numbers; fractions up to 1 state their unit."""
    x1, y1, x2, y2 = map(float, numbers)
    sides = (x1, y1, x2, y2)
    # Whole numbers up to 1 are the whole image or one pixel of it: no sign of a unit.
    if any("." in number for number in numbers) and all(0 <= side <= 1 for side in sides):
        return Box(sides, 1, True)
    return Box(sides, unit, is_stated)


def _find_loc(text: str) -> Box | None:
    if (found := _LOC.search(text)) is not None:
        y1, x1, y2, x2 = found.groups()
        return _box((x1, y1, x2, y2), 1024, True)
    found = _LOC_X_FIRST.search(text)
    return None if found is None else _box(found.groups(), 1000, True)


def _find_y_first(text: str) -> Box | None:
    found = _Y_FIRST.search(text)
    if found is None:
        return None
    y1, x1, y2, x2 = found.groups()
    return _box((x1, y1, x2, y2), 1000, True)


def _find_marked(text: str) -> Box | None:
    for inside in _MARKED.findall(text):
        numbers = _ANYWHERE.findall(inside)[:4]
        if len(numbers) == 4:
            is_open = max(map(float, numbers)) > 1000  # no model's thousandths, so pixels
            return _box(numbers) if is_open else _box(numbers, 1000, True)
    return None


def _find_layout(text: str) -> Box | None:
    """Find two corners, or a box in two brackets; models write whole numbers so in thousandths."""
    for layout in (_PAIR, _DOUBLE, _CORNERS):
        found = layout.search(text)
        if found is not None:
            is_whole = "." not in found[0] and 1 < max(map(float, found.groups())) <= 1000
            return _box(found.groups(), 1000 if is_whole and layout is not _CORNERS else None)
    return None


def _find_numbers(text: str) -> Box | None:
    """Find four numbers in one pair of brackets, else the first four."""
    inside = [each for each in _BRACKETS.findall(text) if len(_ANYWHERE.findall(each)) == 4]
    chosen = inside[0] if inside else text
    numbers = _ANYWHERE.findall(chosen)[:4]
    if len(numbers) < 4:
        return None
    is_percent = _PERCENT.search(chosen) is not None
    return _box(numbers, 100 if is_percent else None, is_percent)


_FINDERS: tuple[Callable[[str], Box | None], ...] = (
    _find_loc, _find_y_first, _find_marked, _find_layout, _find_numbers,
)  # fmt: skip

BOX = PerSampleScorer("box", "box/2", score_box, ("iou", "unscaled"))
