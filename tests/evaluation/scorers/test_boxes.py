"""Boxes in the forms that models write, compared by intersection over union."""

import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.boxes import find_box, iou

CUP = "<|object_ref_start|>a cup<|object_ref_end|>"
# One box, x from 0.1 to 0.5 and y from 0.2 to 0.9, in forms whose unit is known.
KNOWN = [
    "[0.1, 0.2, 0.5, 0.9]",
    "[0.10,0.20,0.50,0.90]",
    "<|box_start|>(100,200),(500,900)<|box_end|>",
    f"{CUP}<|box_start|>(100,200),(500,900)<|box_end|>",
    "<ref>a cup</ref><box>(100,200),(500,900)</box>",
    "(100,200),(500,900)",
    "(0.1,0.2),(0.5,0.9)",
    "<box>[[100, 200, 500, 900]]</box>",
    "<ref>cup 3</ref><box>[[100, 200, 500, 900]]</box>",
    "<box>100 200 500 900</box>",
    "<box>[[0.1, 0.2, 0.5, 0.9]]</box>",
    "[[100,200,500,900]]",
    "[[0.1, 0.2, 0.5, 0.9]]",
    "<|ref|>a cup<|/ref|><|det|>[[100, 200, 500, 900]]<|/det|>",
    "<|begin_of_box|>[[100,200,500,900]]<|end_of_box|>",
    "<loc0205><loc0102><loc0922><loc0512>",
    "<loc0205><loc0102><loc0922><loc0512> cup",
    "cup<loc_100><loc_200><loc_500><loc_900>",
    '{"box_2d": [200, 100, 900, 500], "label": "cup"}',
    "[10%, 20%, 50%, 90%]",
]
# Pixels, percent or thousandths, which only the question tells.
OPEN = [
    "[64, 96, 320, 432]",
    "64, 96, 320, 432",
    "[64.5, 96, 320, 432]",
    "<box>(640,960),(1320,1432)</box>",
    '{"bbox_2d": [64, 96, 320, 432], "label": "cup 2"}',
    '```json\n[\n\t{"bbox_2d": [64, 96, 320, 432], "label": "a cup"}\n]\n```',
    "The cup 1 of 2 is at [64, 96, 320, 432].",
    "[[64, 96], [320, 432]]",
]


def box_score(answer, *references):
    found = find_scorer("box").score([answer], [references])
    return found.strict, found.lenient, found.extras["iou"]


def test_iou_by_hand():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 1), (0, 0, 1, 1)) == pytest.approx(1 / 2)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


@pytest.mark.parametrize("box", [(1, 1, 1, 2), (2, 2, 0, 0), (0, 0, 1e308, 1e308)])
def test_a_box_without_a_finite_area_hits_nothing(box):
    assert iou(box, (0, 0, 1, 1)) == iou((0, 0, 1, 1), box) == 0


def test_half_covered_is_a_hit_and_less_is_none():
    assert box_score("[0, 0, 2, 1]", "[0, 0, 1, 1]") == (1, 1, pytest.approx(0.5))
    assert box_score("[0, 0, 2.1, 1]", "[0, 0, 1, 1]") == (0, 0, pytest.approx(1 / 2.1))


@pytest.mark.parametrize(
    ("answer", "strict"),
    [
        ("[0.1, 0.2, 0.5, 0.9]", 1),
        (" [0.10,0.2,.5, 0.9]\n", 1),
        ("0.1, 0.2, 0.5, 0.9", 0),
        ("(0.1, 0.2, 0.5, 0.9)", 0),
        ("[0.1, 0.2, 0.5, 0.9].", 0),
        ("The box is [0.1, 0.2, 0.5, 0.9]", 0),
        ("object 1 of 3: [0.1, 0.2, 0.5, 0.9]", 0),
        ("x1=0.1 y1=0.2 x2=0.5 y2=0.9", 0),
    ],
)
def test_strict_wants_the_format_and_lenient_the_four_numbers(answer, strict):
    assert box_score(answer, "[0.1, 0.2, 0.5, 0.9]") == (strict, 1, pytest.approx(1))


@pytest.mark.parametrize(
    "answer",
    ["[0.1, 0.2, 0.5]", "no box", "[a, b, c, d]", "[nan, 0, 1, 1]", "[" + "9" * 400 + ",0,1,1]"],
)
def test_what_is_no_box_is_a_miss(answer):
    assert box_score(answer, "[0, 0, 1, 1]") == (0, 0, 0)


@pytest.mark.parametrize("unit", [1, 100, 1000, 640])
def test_boxes_are_in_the_unit_of_the_reference(unit):
    right, predicted = (
        [side * unit for side in box] for box in ([0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.4])
    )
    assert box_score(str(predicted), str(right)) == (1, 1, pytest.approx(0.75))


def test_the_best_of_several_boxes_counts():
    assert box_score("[0, 0, 1, 1]", "[5, 5, 6, 6]", "[0, 0, 1, 1]") == (1, 1, 1)


def test_a_reference_that_is_no_box_is_named():
    with pytest.raises(ValueError, match=r"got the reference 'red': give \[x1, y1, x2, y2\]"):
        box_score("[0, 0, 1, 1]", "red")


def test_numbers_inside_words_are_no_sides():
    assert find_box("img2 has 1 2 3 4").sides == (1, 2, 3, 4)
    assert find_box("v1.2.3.4") is None


@pytest.mark.parametrize("right", [*KNOWN, *OPEN])
def test_a_copy_of_the_reference_is_right_in_any_form(right):
    assert box_score(right, right) == (1, 1, 1)
    assert box_score(f" {right}\n", right)[:2] == (1, 1)


@pytest.mark.parametrize("right", KNOWN)
@pytest.mark.parametrize("answer", KNOWN)
def test_forms_of_known_unit_are_compared_in_one_unit(answer, right):
    _, lenient, overlap = box_score(answer, right)
    assert lenient == 1
    assert overlap == pytest.approx(1, abs=0.02)  # <loc> has steps of 1 / 1024


def test_the_order_of_the_form_is_kept():
    # A box that is wide where its mirror image is high.
    wide = "[0.0, 0.0, 1.0, 0.25]"
    assert box_score("<loc0000><loc0000><loc0256><loc1024>", wide)[1:] == (1, 1)
    assert box_score("<loc0000><loc0000><loc1024><loc0256>", wide)[1] == 0
    assert box_score("<loc_0><loc_0><loc_1000><loc_250>", wide)[1:] == (1, 1)
    assert box_score('{"box_2d": [0, 0, 250, 1000]}', wide)[1:] == (1, 1)
    assert box_score('{"bbox_2d": [0.0, 0.0, 1.0, 0.25]}', wide)[1:] == (1, 1)


@pytest.mark.parametrize("right", KNOWN + OPEN)
def test_other_numbers_in_the_form_of_the_reference_are_formal(right):
    left, top, width, height = 0.1, 0.2, 0.4, 0.7
    box = find_box(right)
    unit = box.unit or 640
    # Ten percent lower: the overlap is 0.9 of the height over 1.1 of it.
    sides = [left, top + height / 10, left + width, top + 1.1 * height]
    if box.unit is None:
        x1, y1, x2, y2 = box.sides
        sides = [x1, y1 + (y2 - y1) / 10, x2, y2 + (y2 - y1) / 10]
        unit = 1
    moved = "[" + ", ".join(f"{side * unit:.6f}" for side in sides) + "]"
    if unit in (1000, 1024, 100):
        moved = "[" + ", ".join(f"{side:.6f}" for side in sides) + "]"
    strict, lenient, overlap = box_score(moved, right)
    assert lenient == 1
    assert overlap == pytest.approx(0.9 / 1.1, abs=0.02)
    assert strict == float(right.strip().startswith("[") and "[[" not in right and "%" not in right)


@pytest.mark.parametrize(
    ("answer", "right", "strict"),
    [
        ("<|box_start|>(110,200),(500,900)<|box_end|>", KNOWN[2], 1),
        ("<|box_start|>( 110, 200 ), (500,900)<|box_end|>", KNOWN[2], 1),
        (f"{CUP}<|box_start|>(110,200),(500,900)<|box_end|>", KNOWN[2], 1),  # names are no form
        ("(110,200),(500,900)", KNOWN[2], 0),  # decoded without the special tokens
        ("It is <|box_start|>(110,200),(500,900)<|box_end|>", KNOWN[2], 0),
        ("[[110, 200, 500, 900]]", "<box>[[100, 200, 500, 900]]</box>", 0),
        ("<box>[[110, 200, 500, 900]]</box>", "<box>[[100, 200, 500, 900]]</box>", 1),
        ("<loc0205><loc0110><loc0922><loc0512>", KNOWN[15], 1),
        ('{"bbox_2d": [64, 90, 320, 432], "label": "mug"}', OPEN[4], 1),
        ("[64, 90, 320, 432]", OPEN[4], 0),
    ],
)
def test_strict_is_the_form_of_the_reference(answer, right, strict):
    assert box_score(answer, right)[:2] == (strict, 1)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("[0.1, 0.2, 0.5, 0.9]", "[64, 96, 320, 432]"),
        ("<|box_start|>(100,200),(500,900)<|box_end|>", "[64, 96, 320, 432]"),
        ("<loc0205><loc0102><loc0922><loc0512>", "[64, 96, 320, 432]"),
        ("[64, 96, 320, 432]", "[0.1, 0.2, 0.5, 0.9]"),
        ("[1640, 96, 1920, 432]", "<|box_start|>(100,200),(500,900)<|box_end|>"),
    ],
)
def test_units_that_cannot_be_compared_are_counted(answer, right):
    found = find_scorer("box").score([answer, right], [(right,), (right,)])
    assert found.lenient_scores == [0, 1]
    assert found.extras == {"iou": 0.5, "unscaled": 0.5}


def test_the_whole_image_is_a_box_of_fractions_beside_fractions():
    assert box_score("[0, 0, 1, 1]", "[0.0, 0.0, 1.0, 0.9]")[1:] == (1, pytest.approx(0.9))
    assert box_score("[0.0, 0.0, 1.0, 0.9]", "[0, 0, 1, 1]")[1:] == (1, pytest.approx(0.9))


def test_a_copy_of_a_box_without_area_is_right():
    assert box_score("[5, 5, 5, 9]", "[5, 5, 5, 9]") == (1, 1, 1)
    assert box_score("[5, 5, 5, 8]", "[5, 5, 5, 9]") == (0, 0, 0)


def test_a_long_text_of_open_marks_is_read_at_once():
    assert find_box("<box>" * 20_000 + "[" * 20_000 + "1%" * 3) is None
