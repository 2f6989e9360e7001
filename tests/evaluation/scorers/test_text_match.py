"""Short answers: exact, contains, fraction, option, and the words they are made of."""

import pytest

from mmcl.evaluation import find_scorer
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
