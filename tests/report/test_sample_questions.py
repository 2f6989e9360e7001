"""Samples of answer tasks on the page: question, right answers, given answers."""

import json

import pytest

from mmcl.evaluation import Prediction, predictions_path, write_predictions
from mmcl.evaluation.run_files import RunFiles
from mmcl.report import write_report

PEOPLE = ("red",) * 3 + ("dark red",) * 6 + ("wine",)
ATTACK = "<script>alert(1)</script>"


@pytest.fixture
def folder(make_run, monkeypatch):
    """A run whose first sample has a question and three predictions."""
    monkeypatch.setattr("mmcl.report.page._draw", lambda *_: {})
    monkeypatch.setattr("mmcl.report.plots.heat_map", lambda *_: b"")
    folder = make_run()
    entries = json.loads((folder / "figures" / "samples.json").read_text())
    entries[0] |= {"target": "dark red", "question": "What colour\nis <the> ball?"}
    (folder / "figures" / "samples.json").write_text(json.dumps(entries))
    predictions = {0: ("", 0.0, 0.0), 1: ("red", 0.9, 0.9), 5: ("The ball is dark red", 0.0, 1.0)}
    for row, (text, strict, lenient) in predictions.items():
        answer = Prediction(
            "000", "dark red", text, strict >= 0.5, None, "", PEOPLE, lenient, strict
        )
        write_predictions(predictions_path(folder, row, 0), [answer])
    return folder


def part_of(page):
    """The first sample on a page."""
    return page.split('<div class="sample">')[1]


def test_a_sample_has_its_question_and_every_right_answer_once(folder):
    sample = RunFiles.read(folder).samples[0]
    assert sample.question == "What colour\nis <the> ball?"
    assert sample.right_answers == ("dark red", "red", "wine")
    assert RunFiles.read(folder).samples[1].right_answers == ("two",)


def test_the_page_shows_question_right_answers_and_predictions(folder):
    part = part_of(write_report(folder).read_text("utf-8"))
    assert "What colour\nis &lt;the&gt; ball?" in part
    assert "dark red<i> or </i>red<i> or </i>wine</div>" in part
    zero, learned, last = part.split("<li>")[1:]
    assert "✗" in zero
    assert "no answer" in zero
    assert "✓" in learned
    assert "<i>90.0</i>" in learned
    assert "≈" in last
    assert "The ball is dark red" in last
    assert "not in the requested form" in last


def test_many_right_answers_are_cut(folder):
    people = tuple(f"answer {n}" for n in range(8))
    write_predictions(
        predictions_path(folder, 5, 0), [Prediction("000", "x", "x", True, references=people)]
    )
    part = part_of(write_report(folder).read_text("utf-8"))
    assert "answer 4<i> and 3 more</i>" in part
    assert "answer 5" not in part


def test_a_sample_of_text_alone_needs_no_image(folder):
    entry = {"task": "zero-one", "key": "000", "target": "red", "question": "What is 1 + 1?"}
    (folder / "figures" / "samples.json").write_text(json.dumps([entry]))
    page = write_report(folder).read_text("utf-8")
    assert "What is 1 + 1?" in part_of(page)
    assert "<img" not in page


@pytest.mark.parametrize("change", [{"question": 7}, {"image": None}, {"target": None}])
def test_an_entry_of_something_else_is_named_on_the_page(folder, change):
    entries = json.loads((folder / "figures" / "samples.json").read_text())
    entries[0] |= change
    (folder / "figures" / "samples.json").write_text(json.dumps(entries))
    assert "samples.json is not valid" in write_report(folder).read_text("utf-8")


def test_questions_and_references_are_shown_and_never_run(folder):
    entry = {"task": "zero-one", "key": "000", "target": ATTACK, "question": ATTACK}
    (folder / "figures" / "samples.json").write_text(json.dumps([entry]))
    answer = Prediction("000", ATTACK, ATTACK, True, references=(ATTACK, ATTACK + "2"))
    write_predictions(predictions_path(folder, 5, 0), [answer])
    assert "<script" not in write_report(folder).read_text("utf-8")


def test_a_page_without_questions_says_nothing_of_them(make_run):
    page = write_report(make_run()).read_text("utf-8")
    assert "Test images with the right answer" in page
    assert 'class="question"' not in page
    assert 'class="samples questions"' not in page
