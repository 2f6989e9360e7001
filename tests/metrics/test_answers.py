import pytest

from mmcl.metrics import (
    Answer,
    accuracy,
    answers_path,
    find_scorer,
    grade,
    read_answers,
    write_answers,
)

LINE = '{"key": "a", "truth": "b", "answer": "c", "correct": true, "score": 1}'


def test_answers_come_back_as_they_were(tmp_path):
    odd = "two\nlines, \u2028 a separator, \x85, 日本語, \ud800 and \\"
    answers = [
        Answer("000", "zero", "zero", True, 0.75),
        Answer("001", odd, "", False),
        Answer(odd, "x", odd, False, -3e-9),
    ]
    write_answers(tmp_path / "a" / "b.jsonl", answers)
    assert read_answers(tmp_path / "a" / "b.jsonl") == answers


def test_nothing_said_is_an_empty_file(tmp_path):
    write_answers(tmp_path / "none.jsonl", [])
    assert (tmp_path / "none.jsonl").read_bytes() == b""
    assert read_answers(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object with key, truth, answer, correct, score"),
        (LINE.replace('"key"', '"id"'), "expected an object with key"),
        (LINE.replace('"a"', "7"), "'key' is 7, expected a string"),
        (LINE.replace("true", "1"), "'correct' is 1, expected a boolean"),
        (LINE.replace("1}", '"1"}'), "'score' is \"1\", expected a number or null"),
        (LINE.replace("1}", "NaN}"), "NaN is not a finite number"),
        (LINE.replace("1}", '1, "extra": 1}'), "and perhaps question, references, lenient, strict"),
        (LINE.replace("1}", '1, "question": null}'), "'question' is null, expected a string"),
        (LINE.replace("1}", '1, "references": "b"}'), "expected a list of strings"),
        (LINE.replace("1}", '1, "strict": "1"}'), "'strict' is \"1\", expected a number or null"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, sentence):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ValueError, match="line 2") as caught:
        read_answers(path)
    assert sentence in str(caught.value)


def test_a_score_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="give a finite number or None"):
        write_answers(tmp_path / "x", [Answer("k", "a", "a", True, float("nan"))])
    assert list(tmp_path.iterdir()) == []


def test_accuracy_is_the_share_of_right_answers():
    answers = [Answer("k", "a", "a", right) for right in (True, False, True, True)]
    assert accuracy(answers) == 0.75
    assert accuracy([]) is None


def test_the_path_names_row_and_column(tmp_path):
    assert answers_path(tmp_path, 3, 12) == tmp_path / "answers" / "row_03" / "col_12.jsonl"


def test_a_generated_answer_keeps_question_references_and_both_scores(tmp_path):
    answers = [
        Answer("a", "red", "it is red", False, None, "Which?\n", ("red", "red", "dark"), 1.0, 0.0),
        Answer("b", "red", "", False, references=("red",), lenient=0.0, strict=0.0),
    ]
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl") == answers
    assert answers[0].right_answers == ("red", "red", "dark")


def test_an_answer_of_a_classifier_is_written_as_ever(tmp_path):
    write_answers(tmp_path / "a.jsonl", [Answer("a", "b", "c", True, 1)])
    assert (tmp_path / "a.jsonl").read_text() == LINE + "\n"
    assert Answer("a", "b", "c", True).right_answers == ("b",)


@pytest.mark.parametrize("name", ["strict", "lenient"])
def test_a_strict_score_that_is_not_finite_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} of 'k' is inf: give a finite number or None"):
        write_answers(tmp_path / "x", [Answer("k", "a", "a", True, **{name: float("inf")})])


def test_grading_fills_in_both_scores_and_what_is_right():
    people = ("red",) * 2 + ("blue",) * 8
    answers = [
        Answer("a", "red", "it is blue", True, references=people),
        Answer("b", "red", "red", False, references=people),
        Answer("c", "red", "Red", False),
    ]
    graded, found = grade(answers, find_scorer("vqa"))
    assert [each.strict for each in graded] == pytest.approx([0, 0.6, 1])
    assert [each.lenient for each in graded] == pytest.approx([1, 0.6, 1])
    assert [each.correct for each in graded] == [False, True, True]
    assert found.strict == pytest.approx(1.6 / 3)
