"""What LLaVA-style repositories write is read, joined with its truth, and its gaps are named."""

import json

import pytest

from mmcl.evaluation.llava_predictions import is_llava, join

TRUTH = [
    {"question_id": 1, "image": "a.jpg", "text": "<image>\nWhat colour?", "answer": "red"},
    {"question_id": "2", "text": "How many?", "answer": 3},
    {"question_id": 3, "text": "Where?", "answers": [{"answer": "left"}, {"answer": "right"}]},
    {
        "id": "four",
        "conversations": [
            {"from": "human", "value": "<image>\nHello?"},
            {"from": "gpt", "value": "Yes."},
            {"from": "human", "value": "Which box?"},
            {"from": "gpt", "value": "[0, 0, 1, 1]"},
        ],
    },
    {"question_id": 5, "text": "The box?", "answer": [0.5, 0.5, 1, 1]},
]


def line(question, text):
    extra = {"prompt": "What?", "answer_id": "x", "model_id": "llava", "metadata": {}}
    return json.dumps({"question_id": question, "text": text, **extra})


@pytest.fixture
def files(tmp_path):
    answers, truth = tmp_path / "merge.jsonl", tmp_path / "test.json"
    lines = [line(2, "3"), line("1", "blue"), line(1, "red"), line("four", "no"), line(99, "x")]
    answers.write_text("\n".join(lines) + "\n")
    truth.write_text(json.dumps(TRUTH))
    return answers, truth


def test_every_question_gets_a_row_in_the_order_of_the_truth(files):
    found = join(*files)
    rows = [(each.key, each.question, each.references, each.text) for each in found.answers]
    assert rows == [
        ("1", "What colour?", ("red",), "blue"),
        ("2", "How many?", ("3",), "3"),
        ("3", "Where?", ("left", "right"), ""),
        ("four", "Which box?", ("[0, 0, 1, 1]",), "no"),
        ("5", "The box?", ("[0.5, 0.5, 1, 1]",), ""),
    ]


def test_missing_repeated_and_unknown_answers_are_named(files):
    found = join(*files)
    assert (found.missing, found.repeated, found.unknown) == (["3", "5"], ["1"], ["99"])


def test_a_truth_of_json_lines_is_read_alike(files):
    answers, truth = files
    expected = join(answers, truth)
    truth.write_text("\n".join(map(json.dumps, TRUTH)) + "\n")
    assert join(answers, truth) == expected


def test_a_file_of_ours_is_told_from_one_of_llava(tmp_path, files):
    ours = tmp_path / "col_00.jsonl"
    ours.write_text('{"key": "a", "truth": "b", "answer": "b", "correct": true, "score": null}\n')
    assert is_llava(files[0])
    assert not is_llava(ours)
    ours.write_text("")
    assert not is_llava(ours)


@pytest.mark.parametrize(
    ("which", "text", "sentence"),
    [
        (0, '{"question_id": 1}', "line 1 has text None: expected the prediction"),
        (0, '{"text": "red"}', "line 1 has question_id None: expected a number or a text"),
        (0, "[1]", "entry 1 is int: expected an object"),
        (0, "{", "line 1 is not valid JSON"),
        (1, '[{"question_id": 1}]', "entry 1 has no right answer: expected 'answer'"),
        (1, '[{"question_id": 1, "answer": ""}]', "entry 1 has no right answer"),
        (1, '[{"question_id": 1, "answer": true}]', "entry 1 has no right answer"),
        (1, '[{"id": true, "answer": "a"}]', "entry 1 has question_id True"),
        (1, '[{"id": 1, "answer": "a"}, {"id": 1, "answer": "b"}]', "repeats question '1'"),
        (1, "[]", "holds no question: give the test file of these predictions"),
        (1, "7", "line 1 is int: expected an object"),
    ],
)
def test_what_is_something_else_is_named_with_its_place(files, which, text, sentence):
    files[which].write_text(text)
    with pytest.raises(ValueError, match="expected|give|write it again") as caught:
        join(*files)
    assert sentence in str(caught.value)
    assert str(files[which]) in str(caught.value)
