"""What holds for every scorer, found by name."""

import random
import subprocess
import sys

import pytest

from mmcl.evaluation import find_scorer
from mmcl.evaluation.scorers import SCORERS

SENTENCES = (
    "a man rides a brown horse along the beach",
    "two dogs play with a ball in the park",
    "ein roter Bus hält an der Straße",
    "एक लाल बस सड़क पर खड़ी है",
    "一辆红色的公交车停在路边",
)
RIGHT = {
    "box": ("[0.1, 0.2, 0.5, 0.9]", "[10, 20, 50, 90]", "[0,0,1000,1000]"),
    "option": ("A", "B", "(C)", "d"),
    "pope": ("yes", "no", "Yes"),
    "mme": ("yes", "no", "Yes"),
    "fraction": ("Texas, Ohio", "Iowa", "new york,maine , utah"),
    "exact": (*SENTENCES, "B", "yes", "7", "+", "🐱", "Ärger", "a", "the", "3.5", "."),
    "contains": (*SENTENCES, "yes", "+", "🐱"),
    "vqa": (*SENTENCES, "yes", "a", "the", "2", "don't", "+", "🐱"),
}
EMPTY = ("", " ", "\n\t", "\u200b", "\ufeff \u00a0", "\u2028", "\x00")


def references_of(name):
    return [(right,) for right in RIGHT.get(name, SENTENCES)]


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_answer_is_worth_nothing(name, empty):
    rows = references_of(name)
    found = find_scorer(name).score([empty] * len(rows), rows)
    assert found.strict_scores == found.lenient_scores == [0.0] * len(rows)
    assert found.strict == found.lenient == 0.0
    assert all(value == 0.0 for value in found.extras.values())


@pytest.mark.parametrize("name", SCORERS)
def test_what_is_right_scores_one(name):
    rows = references_of(name)
    found = find_scorer(name).score([right for (right,) in rows], rows)
    form_is_lost = name in ("box", "option")  # "(C)" is right and not in the requested form
    for strict, lenient, (right,) in zip(
        found.strict_scores, found.lenient_scores, rows, strict=True
    ):
        assert lenient == pytest.approx(1.0), right
        assert form_is_lost or strict == pytest.approx(1.0), right
    assert found.lenient == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCORERS)
def test_ten_people_who_agree_are_as_good_as_one(name):
    rows = [right * 10 for right in references_of(name)]
    found = find_scorer(name).score([right[0] for right in rows], rows)
    assert found.lenient == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_stay_between_zero_and_one_and_lenient_above_strict(name):
    draw = random.Random(0)
    letters = "ab B.(),[]0.15 \n-'é红🐱yesno"
    references = references_of(name) * 8
    predictions = ["".join(draw.choices(letters, k=draw.randrange(30))) for _ in references]
    pairs = zip(predictions, references, strict=True)
    mixed = [draw.choice([text, right + text, right]) for text, (right,) in pairs]
    found = find_scorer(name).score(mixed, references)
    for strict, lenient in zip(found.strict_scores, found.lenient_scores, strict=True):
        assert 0.0 <= strict <= lenient <= 1.0
    assert 0.0 <= found.strict <= found.lenient <= 1.0


@pytest.mark.parametrize("name", SCORERS)
def test_an_unanswered_row_stays_in_the_denominator(name):
    (right,), rows = references_of(name)[0], references_of(name)[:1] * 4
    found = find_scorer(name).score([right, "", "", ""], rows)
    whole = find_scorer(name).score([right] * 4, rows)
    assert len(found.strict_scores) == 4
    if name not in ("bleu", "caption"):
        assert found.strict == pytest.approx(whole.strict / 4)
    assert found.strict < 0.5 * max(whole.strict, 1e-9) or name == "cider"


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    ("answers", "references", "sentence"),
    [
        (["B"], [], "1 predictions for references of 0 samples"),
        ([], [], "there are no predictions to score: give at least one"),
        (
            ["B", "B"],
            [("B",), ()],
            r"references of sample 1 are \(\): give at least one, none empty",
        ),
        (["B"], [("B", "")], r"references of sample 0 are \('B', ''\): give at least one"),
        (["B"], [("\u200b",)], "none empty"),
        (["B"], ["B"], "references of sample 0 are the text 'B': give a tuple of it"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(name, answers, references, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_scorer(name).score(answers, references)


def test_an_unknown_scorer_lists_the_known():
    with pytest.raises(ValueError, match="no scorer 'blue': choose one of exact, contains, .*box"):
        find_scorer("blue")


def test_a_scorer_is_found_by_its_version_and_no_other_version():
    for name, scorer in SCORERS.items():
        assert scorer.name == name
        assert scorer.version.startswith(f"{name}/")
        assert find_scorer(scorer.version) is scorer
    with pytest.raises(ValueError, match="there is no scorer 'exact/0', only exact/1"):
        find_scorer("exact/0")


@pytest.mark.slow
def test_scorers_are_found_without_loading_the_library_for_bleu():
    code = "import sys, mmcl.evaluation.scorers; print('sacrebleu' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
