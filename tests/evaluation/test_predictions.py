import pytest

from mmcl.evaluation import (
    Prediction,
    accuracy,
    find_scorer,
    read_predictions,
    rescore,
    write_predictions,
)

LINE = '{"key": "a", "target": "b", "text": "c", "correct": true, "score": 1}'


def test_answers_come_back_as_they_were(tmp_path):
    odd = "two\nlines, \u2028 a separator, \x85, 日本語, \ud800 and \\"
    answers = [
        Prediction("000", "zero", "zero", True, 0.75),
        Prediction("001", odd, "", False),
        Prediction(odd, "x", odd, False, -3e-9),
    ]
    write_predictions(tmp_path / "a" / "b.jsonl", answers)
    assert read_predictions(tmp_path / "a" / "b.jsonl") == answers


def test_no_predictions_are_an_empty_file(tmp_path):
    write_predictions(tmp_path / "none.jsonl", [])
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    assert read_predictions(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected object with key, target, text, correct, score"),
        (LINE.replace('"key"', '"id"'), "'key' is missing; unknown keys ['id']"),
        (
            LINE.replace("target", "truth").replace("text", "answer"),
            "'truth' is called 'target' now; the key 'answer' is called 'text' now",
        ),
        (LINE.replace('"a"', "7"), "'key' is 7, expected string"),
        (LINE.replace("true", "1"), "'correct' is 1, expected boolean"),
        (LINE.replace("1}", '"1"}'), "'score' is '1', expected finite number or null"),
        (LINE.replace("1}", "NaN}"), "NaN is not a finite number"),
        (LINE.replace("1}", '1, "extra": 1}'), "unknown keys ['extra']"),
        (LINE.replace("1}", '1, "question": null}'), "'question' is None, expected string"),
        (LINE.replace("1}", '1, "references": "b"}'), "expected list of string"),
        (
            LINE.replace("1}", '1, "strict": "1"}'),
            "'strict' is '1', expected finite number or null",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, sentence):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_predictions(path)
    assert sentence in str(caught.value)


def test_a_score_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="give a finite number or None"):
        write_predictions(tmp_path / "x", [Prediction("k", "a", "a", True, float("nan"))])
    assert list(tmp_path.iterdir()) == []


def test_accuracy_is_the_share_of_right_answers():
    answers = [Prediction("k", "a", "a", right) for right in (True, False, True, True)]
    assert accuracy(answers) == 0.75
    assert accuracy([]) is None


def test_a_generated_answer_keeps_question_references_and_both_scores(tmp_path):
    answers = [
        Prediction(
            "a", "red", "it is red", False, None, "Which?\n", ("red", "red", "dark"), 1.0, 0.0
        ),
        Prediction("b", "red", "", False, references=("red",), lenient=0.0, strict=0.0),
    ]
    write_predictions(tmp_path / "a.jsonl", answers)
    assert read_predictions(tmp_path / "a.jsonl") == answers
    assert answers[0].right_answers == ("red", "red", "dark")


def test_an_answer_of_a_classifier_is_written_as_ever(tmp_path):
    write_predictions(tmp_path / "a.jsonl", [Prediction("a", "b", "c", True, 1)])
    assert (tmp_path / "a.jsonl").read_text() == LINE + "\n"
    assert Prediction("a", "b", "c", True).right_answers == ("b",)


@pytest.mark.parametrize("name", ["strict", "lenient"])
def test_a_strict_score_that_is_not_finite_is_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match="score of 'k' is not finite.*give a finite number or None"
    ):
        write_predictions(tmp_path / "x", [Prediction("k", "a", "a", True, **{name: float("inf")})])


def test_grading_fills_in_both_scores_and_what_is_right():
    people = ("red",) * 2 + ("blue",) * 8
    answers = [
        Prediction("a", "red", "it is blue", True, references=people),
        Prediction("b", "red", "red", False, references=people),
        Prediction("c", "red", "Red", False),
    ]
    graded, found = rescore(answers, find_scorer("vqa"))
    assert [each.strict for each in graded] == pytest.approx([0, 0.6, 1])
    assert [each.lenient for each in graded] == pytest.approx([1, 0.6, 1])
    assert [each.correct for each in graded] == [False, True, True]
    assert found.strict == pytest.approx(1.6 / 3)
