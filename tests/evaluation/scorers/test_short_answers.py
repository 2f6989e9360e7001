"""Short answers: exact, contains, fraction, option, VQA, and the words they are made of."""

import itertools
import random
import re

import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.short_answers import edit_distance, normal, vqa_accuracy
from mmcl.evaluation.scorers.text_normalization import occurs, option_letter, plain, words


def scores(name, answer, *references):
    found = find_scorer(name).score([answer], [references])
    return found.strict, found.lenient


@pytest.mark.parametrize(
    ("answer", "right", "strict", "lenient"),
    [
        ("Red", "red", 1, 1),
        ("  red.\n", "red", 1, 1),
        ("red", "red.", 1, 1),
        ("RED!", "red", 0, 1),
        ("It is red, I think.", "red", 0, 1),
        ("It is Light Blue here", "light blue", 0, 1),
        ("blue, light", "light blue", 0, 0),
        ("redder", "red", 0, 0),
        ("predator", "red", 0, 0),
        ("light", "light blue", 0, 0),  # the other way round is not right
        ("e", "red", 0, 0),
        ("3", "13", 0, 0),
        ("There are 13.", "13", 0, 1),
        ("3.5", "3", 0, 0),
        ("-3", "3", 0, 0),
        ("B.", "B", 1, 1),
        ("The answer is B", "B", 0, 1),
        ("B. a red bus", "B", 0, 1),
        ("It is a bus", "A", 0, 0),
        ("No, there is none", "no", 0, 1),
        ("yes or no", "no", 0, 0),
        ("nothing", "no", 0, 0),
        ("ＲＥＤ", "red", 0, 1),
        ("cafe\u0301", "café", 1, 1),
        ("STRASSE", "Straße", 1, 1),
        ("这是红色的", "红色", 0, 1),
        ("❤", "❤️", 1, 1),
        ("...", "red", 0, 0),
    ],
)
def test_exact(answer, right, strict, lenient):
    assert scores("exact", answer, right) == (strict, lenient)


def test_any_of_several_right_answers_is_right():
    assert scores("exact", "crimson", "red", "crimson") == (1, 1)


@pytest.mark.parametrize(
    ("answer", "right", "strict", "lenient"),
    [
        ("The liver, mostly.", "liver", 1, 1),
        ("Normal", "no", 0, 1),  # what the released code counts stays visible as lenient
        ("no", "no", 1, 1),
        ("iver", "liver", 0, 0),
        ("+", "+", 1, 1),
        ("a -> b", "->", 1, 1),
        ("what?!", "?!", 0, 1),
    ],
)
def test_contains(answer, right, strict, lenient):
    assert scores("contains", answer, right) == (strict, lenient)


@pytest.mark.parametrize(
    ("answer", "strict", "lenient", "jaccard"),
    [
        ("Ohio, Texas, Iowa, Utah", 1, 1, 1),
        ("texas,OHIO .", 1 / 2, 1 / 2, 1 / 2),
        ("Texas, Texas, Maine", 1 / 4, 1 / 4, 1 / 5),
        ("Ohio, Texas, Iowa, Utah, Maine", 1, 1, 4 / 5),
        ("They are Ohio and Texas", 0, 1 / 2, 0),
        ("West Virginia", 0, 0, 0),
    ],
)
def test_fraction_counts_the_right_items_that_were_given(answer, strict, lenient, jaccard):
    found = find_scorer("fraction").score([answer], [("Texas, Ohio, Utah, Iowa",)])
    assert (found.strict, found.lenient) == (strict, lenient)
    assert found.extras == {"jaccard": pytest.approx(jaccard)}


@pytest.mark.parametrize(
    ("answer", "strict", "lenient"),
    [
        ("B", 1, 1),
        ("B.", 1, 1),
        ("B. Paris", 1, 1),
        ("Well: The answer is B because of it.", 1, 1),
        ("The answer is A. No, The answer is B.", 0, 0),
        ("b", 0, 1),
        ("(B)", 0, 1),
        ("Option B", 0, 1),
        ("Paris", 0, 0),
        ("Bees", 0, 0),
        ("C", 0, 0),
    ],
)
def test_option(answer, strict, lenient):
    assert scores("option", answer, "B") == (strict, lenient)


def test_option_refuses_what_is_no_letter():
    with pytest.raises(ValueError, match="got the reference 'Paris': give one letter"):
        scores("option", "B", "Paris")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("b", "B"),
        ("(c) a cat", "C"),
        ("[D]", "D"),
        ("**D**", "D"),
        ("Answer: C", "C"),
        ("The answer is (a).", "A"),
        ("the answer is a cat", None),
        ("The correct option is: E, clearly", "E"),
        ("Paris, B", "B"),
        ("A or B", None),
        ("A cat", None),
        ("I think so", None),
        ("T-shirt", None),
        ("option B, not option C", None),
        ("é", None),
    ],
)
def test_the_option_of_a_sentence(answer, letter):
    assert option_letter(answer) == letter


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's -3.5 °C, ok?", ["it", "s", "-3.5", "°", "c", "ok"]),
        ("1,000 x-ray", ["1,000", "x", "ray"]),
        ("C++", ["c", "+", "+"]),
        ("红色car", ["红", "色", "car"]),
        ("हिन्दी café", ["हिन्दी", "café"]),
        ("👩\u200d💻", ["👩", "💻"]),
        ("... !", []),
    ],
)
def test_words(text, found):
    assert list(words(text)) == found


def test_a_right_answer_of_punctuation_occurs_nowhere():
    assert not occurs("?!", "what?!")
    assert plain("?!") == "?!"


def vqa_score(answer, references):
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
    assert vqa_score("red", people)[0] == pytest.approx(by_loops("red", people))


def test_the_published_values():
    values = [vqa_accuracy(matches, 10) for matches in range(6)]
    assert values == pytest.approx([0, 0.3, 0.6, 0.9, 1, 1])


def test_more_than_ten_people_follow_the_same_rule():
    for matches, people in itertools.product(range(5), (10, 11, 20)):
        given = ["x"] * matches + ["y"] * (people - matches)
        assert vqa_accuracy(matches, people) == pytest.approx(by_loops("x", given))


def test_with_fewer_people_one_match_is_right():
    assert vqa_score("red", ["red", "blue"]) == (1, 1)
    assert vqa_score("red", ["blue"]) == (0, 0)


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
    assert vqa_score("the", ["a"])[0] == 0
    assert vqa_score(".", ["a"]) == (0, 0)


def test_lenient_is_the_worth_of_the_best_answer_that_occurs():
    people = ["red"] * 2 + ["dark red"] + ["blue"] * 7
    assert vqa_score("I see dark red there", people) == (0, pytest.approx(0.6))
    assert vqa_score("it is the Blue one", people) == (0, 1)
    assert vqa_score("re", people) == (0, 0)
    assert vqa_score("There are two dogs", ["2"] * 10) == (0, 1)


def official(text):
    """The official normalization of VQA's evaluation, as its steps are described."""
    text = " ".join(text.replace("\n", " ").replace("\t", " ").split())
    kept = text
    for mark in [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<",
                 "@", "`", ",", "?", "!"]:  # fmt: skip
        if f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text):
            kept = kept.replace(mark, "")
        else:
            kept = kept.replace(mark, " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    digits = dict(none="0", zero="0", one="1", two="2", three="3", ten="10")
    found = [digits.get(word, word) for word in kept.lower().split()]
    dropped = {"dont": "don't", "isnt": "isn't", "wont": "won't", "youre": "you're"}
    return " ".join(dropped.get(word, word) for word in found if word not in ("a", "an", "the"))


PREDICTED = [
    "yes", "Yes.", "two", "A dog", "the  red car", "red-brown", "red - brown", "1,000", "3.5",
    "St. Paul", "dont", "black/white", "black / white", "(left)", "it's", "10 %", "none", "no, one",
]  # fmt: skip


@pytest.mark.parametrize("answer", PREDICTED)
def test_vqa_is_the_official_script_on_annotations_of_lower_case_words(answer):
    people = ["yes"] * 3 + ["2", "2", "dog", "red brown", "black white", "0", "1000"]
    mine = official(answer)
    parts = []
    for place in range(10):
        others = [given for n, given in enumerate(people) if n != place]
        parts.append(min(1, others.count(mine) / 3))
    assert vqa_score(answer, people)[0] == pytest.approx(sum(parts) / 10)


@pytest.mark.parametrize("answer", [*PREDICTED, "dog's", "what?", "red, blue", "a,b", "1,5 l"])
def test_textvqa_normalizes_both_sides_as_its_evaluation_does(answer):
    def processed(text):
        return official(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())

    people = ["Yes!", "yes", "Two", "the dog 's", "red blue", "ab", "what", "15 l", "red - brown",
              "3.5"]  # fmt: skip
    expected = by_loops(processed(answer), [processed(given) for given in people])
    found = find_scorer("textvqa").score([answer], [tuple(people)])
    assert found.strict == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "references", "strict", "lenient"),
    [
        ("Microsoft", ("microsoft",), 1, 1),
        ("Mocrosoft", ("microsoft", "apple"), 8 / 9, 8 / 9),
        ("abcd", ("abxy",), 1 / 2, 1 / 2),
        ("abcde", ("abxyz",), 0, 0),
        ("It is Microsoft", ("microsoft",), 9 / 15, 1),
        ("12  March", ("12 march",), 1, 1),
        ("x", ("microsoft",), 0, 0),
    ],
)
def test_anls_by_hand(answer, references, strict, lenient):
    assert scores("anls", answer, *references) == pytest.approx((strict, lenient))


def test_the_edit_distance_by_recursion():
    def distance(one, other):
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        shorter = (one[1:], other), (one, other[1:]), (one[1:], other[1:])
        return 1 + min(distance(*pair) for pair in shorter)

    draw = random.Random(0)
    for _ in range(30):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(6))) for _ in range(2))
        assert edit_distance(one, other) == distance(one, other)
