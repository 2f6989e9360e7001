import itertools

import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.vqa import normal, vqa_accuracy


def score(answer, references):
    found = find_scorer("vqa").score([answer], [tuple(references)])
    return found.strict, found.lenient


def by_loops(answer, people):
    """The definition: each person is left out once, three of the others make it right."""
    parts = []
    for left_out in range(len(people)):
        others = [given for place, given in enumerate(people) if place != left_out]
        parts.append(min(1, sum(given == answer for given in others) / 3))
    return sum(parts) / len(parts)


@pytest.mark.parametrize("matches", range(11))
def test_ten_people_are_averaged_with_each_left_out(matches):
    people = ["red"] * matches + [f"other{n}" for n in range(10 - matches)]
    assert score("red", people)[0] == pytest.approx(by_loops("red", people))


def test_the_published_values():
    values = [vqa_accuracy(matches, 10) for matches in range(6)]
    assert values == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_more_than_ten_people_follow_the_same_rule():
    for matches, people in itertools.product(range(5), (10, 11, 20)):
        given = ["x"] * matches + ["y"] * (people - matches)
        assert vqa_accuracy(matches, people) == pytest.approx(by_loops("x", given))


def test_with_fewer_people_one_match_is_right():
    assert score("red", ["red", "blue"]) == (1, 1)
    assert score("red", ["blue"]) == (0, 0)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont", "don't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("black-white", "black white"),
        ("black/ white", "black white"),
        ("  an  apple\n", "apple"),
        ("yes!", "yes"),
        ("A", "a"),
        ("-", "-"),
        ("its", "its"),
    ],
)
def test_answers_are_compared_as_the_official_evaluation_writes_them(answer, normalized):
    assert normal(answer) == normal(normalized) == normalized


def test_articles_alone_are_not_all_the_same():
    assert score("the", ["a"])[0] == 0
    assert score(".", ["a"]) == (0, 0)


def test_lenient_is_the_worth_of_the_best_answer_that_occurs():
    people = ["red"] * 2 + ["dark red"] + ["blue"] * 7
    assert score("I see dark red there", people) == (0, pytest.approx(0.6))
    assert score("it is the Blue one", people) == (0, 1)
    assert score("re", people) == (0, 0)
    assert score("There are two dogs", ["2"] * 10) == (0, 1)
