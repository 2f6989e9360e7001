"""Yes/no questions: POPE's and MME's metrics, by hand and by loops over the published rules."""

import itertools

import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers.yes_no import read_mme, read_pope

# Of five questions three are answered yes, of which two are right.
ANSWERS = ["Yes", "No, there is none.", "Yes, it is", "There is not a dog. Yes", "yes"]
LABELS = ["yes", "yes", "no", "no", "yes"]


def test_pope_by_hand():
    found = find_scorer("pope").score(ANSWERS, [(label,) for label in LABELS])
    assert found.strict_scores == [1, 0, 0, 1, 1]
    assert found.strict == found.extras["accuracy"] == pytest.approx(3 / 5)
    assert found.extras["precision"] == pytest.approx(2 / 3)
    assert found.extras["recall"] == pytest.approx(2 / 3)
    assert found.extras["f1"] == pytest.approx(2 / 3)
    assert found.extras["yes_ratio"] == pytest.approx(3 / 5)


def test_pope_is_the_counts_of_the_published_script():
    said = ["yes", "no", "No.", "Yes", "There is not", "maybe", "no, yes", "know", "yes. no"]
    pairs = list(itertools.product(said, ("yes", "no")))
    found = find_scorer("pope").score([text for text, _ in pairs], [(right,) for _, right in pairs])
    table = dict.fromkeys(itertools.product((0, 1), (0, 1)), 0)
    for text, right in pairs:
        first = text.split(".")[0].replace(",", "").split(" ")
        is_no = "No" in first or "not" in first or "no" in first
        table[int(not is_no), int(right == "yes")] += 1
    hits, alarms, misses, rejects = table[1, 1], table[1, 0], table[0, 1], table[0, 0]
    precision, recall = hits / (hits + alarms), hits / (hits + misses)
    assert dict(found.extras) == pytest.approx(
        {
            "accuracy": (hits + rejects) / len(pairs),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
            "yes_ratio": (hits + alarms) / len(pairs),
        }
    )


@pytest.mark.parametrize(
    ("answer", "pope", "mme"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("NO", "yes", "no"),  # POPE's script knows No and no
        ("No.", "no", "no"),
        ("There is no dog.", "no", "other"),
        ("I do not see it", "no", "other"),
        ("It is. No doubt", "yes", "other"),
        (" yes, it is", "yes", "yes"),
        ("nobody", "yes", "no"),
        ("The answer is yes", "yes", "other"),
    ],
)
def test_answers_are_read_as_the_published_scripts_read_them(answer, pope, mme):
    assert (read_pope(answer), read_mme(answer)) == (pope, mme)


def test_lenient_counts_yes_or_no_anywhere_but_not_both():
    found = find_scorer("mme").score(
        ["The answer is yes", "It is yes or no", "No!"], [("yes",)] * 3
    )
    assert (found.strict_scores, found.lenient_scores) == ([0, 0, 0], [1, 0, 0])


def test_mme_by_hand():
    # color: image 1 both right, image 2 one of two; code_reasoning: one image, none right.
    groups = ["color/1", "color/1", "color/2", "color/2", "code_reasoning/1", "code_reasoning/1"]
    labels = ["yes", "no", "yes", "no", "yes", "no"]
    answers = ["Yes", "No", "Yes", "Yes", "No", "Maybe"]
    scorer = find_scorer("mme")
    found = scorer.score(answers, [(label,) for label in labels], (), groups)
    assert found.strict == pytest.approx(3 / 6)
    assert dict(found.extras) == pytest.approx(
        {
            "color_accuracy": 3 / 4, "color_accuracy+": 1 / 2, "color": 125.0,
            "code_reasoning_accuracy": 0.0, "code_reasoning_accuracy+": 0.0, "code_reasoning": 0.0,
            "perception": 125.0, "cognition": 0.0, "total": 125.0,
        }
    )  # fmt: skip
    # The order of the questions is no matter.
    order = [3, 0, 5, 1, 4, 2]
    again = scorer.score(
        [answers[n] for n in order], [(labels[n],) for n in order], (), [groups[n] for n in order]
    )
    assert dict(again.extras) == pytest.approx(dict(found.extras))


def test_mme_without_images_is_the_accuracy_alone():
    found = find_scorer("mme").score(["yes", "yes"], [("yes",), ("no",)])
    assert (found.strict, dict(found.extras)) == (0.5, {})


@pytest.mark.parametrize("name", ["pope", "mme"])
def test_a_reference_that_is_neither_is_named(name):
    with pytest.raises(ValueError, match=f"the scorer {name} got the reference 'red': give yes or"):
        find_scorer(name).score(["yes"], [("red",)])


def test_pope_without_a_yes_has_no_precision_and_no_f1():
    found = find_scorer("pope").score(["no", "no"], [("no",), ("no",)])
    assert found.extras == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
