"""Multiple choice by letter and by text, with the options that a question lists."""

import itertools
import json
import string

import pytest

from mmcl.core import Task
from mmcl.evaluation import find_scorer
from mmcl.evaluation.evaluators import EvalSpec, GenerationEvaluator
from mmcl.evaluation.scorers.multiple_choice import chosen_option, listed_options

COLORS = {"A": "teal", "B": "gold", "C": "light blue", "D": "blue"}
QUESTION = "Which color is it?\n" + "\n".join(f"{key}. {text}" for key, text in COLORS.items())


def score(answer, reference, question=QUESTION):
    found = find_scorer("option").score([answer], [(reference,)], [question])
    return found.strict, found.lenient


@pytest.mark.parametrize(
    "reference", ["A", "(A)", "a", "A.", "A. teal", "(A) teal", "teal", "Teal"]
)
@pytest.mark.parametrize(
    ("answer", "strict"),
    [
        ("A", 1),
        ("A.", 1),
        ("A. teal", 1),
        ("A. gold", 1),  # the letter decides, as in the published scripts
        ("The answer is A.", 1),
        ("The answer is A. It is teal.", 1),
        ("**A**", 0),
        ("Answer: A", 0),
        ("Option A", 0),
        ("It is teal.", 0),
        ("the correct one is TEAL", 0),
        ("A teal one, I think", 0),
    ],
)
def test_letter_and_text_are_right(answer, strict, reference):
    assert score(answer, reference) == (strict, 1)


@pytest.mark.parametrize("reference", ["A", "A. teal", "teal"])
@pytest.mark.parametrize(
    "answer",
    ["B", "B. teal", "gold", "teal or gold", "A or B", "none", "E", "E. teal or gold", "tealish"],
)
def test_another_option_two_or_none_are_wrong(answer, reference):
    assert score(answer, reference) == (0, 0)


@pytest.mark.parametrize("reference", ["A", "(A)", "A. teal", "(A) teal", "teal"])
def test_a_copy_of_the_reference_is_right(reference):
    assert score(reference, reference) == (1, 1)


def test_an_option_within_another_is_not_a_second_one():
    assert score("It is light blue.", "C") == (0, 1)
    assert score("It is blue.", "D") == (0, 1)
    assert score("It is blue.", "C") == (0, 0)


def test_a_reference_with_its_text_needs_no_list():
    assert score("gold, surely", "B. gold", "") == (0, 1)
    assert score("It is B", "B. gold", "") == (0, 1)
    assert score("teal", "B. gold", "") == (0, 0)


def test_a_text_that_the_question_does_not_list_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"got the reference 'red'.*the question lists A\. teal, B"
    ):
        score("A", "red")
    with pytest.raises(ValueError, match="the question lists no options"):
        score("A", "teal", "Which color?")


@pytest.mark.parametrize(
    ("question", "options"),
    [
        (QUESTION, COLORS),
        ("Which?\nOptions:\nA. teal\nB. gold\nPlease select the correct answer.", "teal gold"),
        ("Which?\n(A) teal\n(B) gold", "teal gold"),
        ("Which?\nA) teal\nB) gold", "teal gold"),
        ("Which?\nA: teal\nB: gold", "teal gold"),
        ("Which?\n[A] teal\n[B] gold\n", "teal gold"),
        ("Options: (A) teal (B) gold", "teal gold"),
        ("Context: none\nOptions: (A) teal, (B) gold\nAnswer:", "teal gold"),
        ("A. one\nB. two\nC. three\n\nWhich?\nA. teal\nB. gold", "teal gold"),
        ("  A. teal  \r\n  B. gold", "teal gold"),
        ("A. teal", ""),
        ("B. teal\nC. gold", ""),
        ("A cat. Which color?", ""),
        ("", ""),
    ],
)
def test_options_are_found_in_a_question(question, options):
    if isinstance(options, str):
        options = dict(zip(string.ascii_uppercase, options.split(), strict=False))
    assert dict(listed_options(question)) == options


def test_an_evaluation_reads_the_options_from_its_questions():
    task = Task(0, "colors", task_type="instruction", scorer="option")
    evaluator = GenerationEvaluator(EvalSpec(task, ()))
    rows = [(0, "a", QUESTION, ["A"], "It is teal"), (1, "b", "Which?", ["A"], "It is teal")]
    evaluator._lines = [json.dumps(row) for row in rows]
    evaluator.compute()
    assert [each.lenient for each in evaluator.answers] == [1, 0]


def inferred(answer, choices):
    """VLMEvalKit's rule for one letter among the words, else one text; from its description."""
    kept = answer
    for mark in ".()[],:;!*#{}":
        kept = kept.replace(mark, " ")
    letters = [letter for letter in choices if letter in kept.split()]
    if len(letters) == 1:
        return letters[0]
    texts = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return texts[0] if len(texts) == 1 and not letters else None


@pytest.mark.parametrize(
    "form",
    [
        "{key}",
        "({key})",
        "{key}.",
        "{key}: {text}",
        "It is {text}.",
        "Option {key}, {text}",
        "{text}",
    ],
)
def test_what_is_chosen_is_what_the_published_rule_infers(form):
    choices = {"A": "teal", "B": "gold", "C": "red", "D": "green"}
    for key, other in itertools.product(choices, choices):
        answer = form.format(key=key, text=choices[other if "{key}" not in form else key])
        assert chosen_option(answer, choices) == inferred(answer, choices) is not None
