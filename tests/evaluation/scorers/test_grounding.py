import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.grounding import find_box, iou


def score(answer, *references):
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
    assert score("[0, 0, 2, 1]", "[0, 0, 1, 1]") == (1, 1, pytest.approx(0.5))
    assert score("[0, 0, 2.1, 1]", "[0, 0, 1, 1]") == (0, 0, pytest.approx(1 / 2.1))


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
    assert score(answer, "[0.1, 0.2, 0.5, 0.9]") == (strict, 1, pytest.approx(1))


@pytest.mark.parametrize(
    "answer",
    ["[0.1, 0.2, 0.5]", "no box", "[a, b, c, d]", "[nan, 0, 1, 1]", "[" + "9" * 400 + ",0,1,1]"],
)
def test_what_is_no_box_is_a_miss(answer):
    assert score(answer, "[0, 0, 1, 1]") == (0, 0, 0)


@pytest.mark.parametrize("unit", [1, 100, 1000, 640])
def test_boxes_are_in_the_unit_of_the_reference(unit):
    right, predicted = (
        [side * unit for side in box] for box in ([0.1, 0.1, 0.5, 0.5], [0.1, 0.1, 0.5, 0.4])
    )
    assert score(str(predicted), str(right)) == (1, 1, pytest.approx(0.75))


def test_the_best_of_several_boxes_counts():
    assert score("[0, 0, 1, 1]", "[5, 5, 6, 6]", "[0, 0, 1, 1]") == (1, 1, 1)


def test_a_reference_that_is_no_box_is_named():
    with pytest.raises(ValueError, match=r"got the reference 'red': give \[x1, y1, x2, y2\]"):
        score("[0, 0, 1, 1]", "red")


def test_numbers_inside_words_are_no_sides():
    assert find_box("img2 has 1 2 3 4") == (1, 2, 3, 4)
    assert find_box("v1.2.3.4") is None
