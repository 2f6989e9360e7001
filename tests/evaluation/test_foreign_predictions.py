"""Predictions of other programs: LLaVA, lm-eval, lmms-eval, VLMEvalKit, VQAv2 and others."""

import csv
import io
import itertools
import json
import zipfile
from xml.sax.saxutils import escape

import pytest

from mmcl.evaluation import find_scorer, rescore
from mmcl.evaluation.foreign_predictions import is_own_format, read_foreign
from mmcl.evaluation.record_files import UnknownLayout, read_records


def joined(answers, truth, annotators=False):
    (found,) = read_foreign(answers, truth, annotators)
    return found


def score(found, scorer):
    return rescore(found.answers, find_scorer(scorer), found.groups)[1]


def write(path, records, as_lines=True):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_text(lines if as_lines else json.dumps(records))
    return path


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
    found = joined(*files)
    rows = [(each.key, each.question, each.references, each.text) for each in found.answers]
    assert rows == [
        ("1", "What colour?", ("red",), "blue"),
        ("2", "How many?", ("3",), "3"),
        ("3", "Where?", ("left", "right"), ""),
        ("four", "Which box?", ("[0, 0, 1, 1]",), "no"),
        ("5", "The box?", ("[0.5, 0.5, 1, 1]",), ""),
    ]


def test_missing_repeated_and_unknown_answers_are_named(files):
    found = joined(*files)
    assert (found.missing, found.repeated, found.unknown) == (["3", "5"], ["1"], ["99"])


def test_a_truth_of_json_lines_is_read_alike(files):
    answers, truth = files
    expected = joined(answers, truth)
    truth.write_text("\n".join(map(json.dumps, TRUTH)) + "\n")
    assert joined(answers, truth) == expected


def test_a_file_of_ours_is_told_from_one_of_another_program(tmp_path, files):
    ours = tmp_path / "col_00.jsonl"
    ours.write_text('{"key": "a", "truth": "b", "answer": "b", "correct": true, "score": null}\n')
    assert not is_own_format(files[0])
    assert is_own_format(ours)
    ours.write_text("")
    assert is_own_format(ours)


@pytest.mark.parametrize(
    ("which", "text", "sentence"),
    [
        (
            0,
            '{"question_id": 1}',
            "the keys question_id, and none of them is known as a prediction",
        ),
        (0, '{"question_id": 1, "text": null}', "line 1 has text None: expected the prediction"),
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
        joined(*files)
    assert sentence in str(caught.value)
    assert str(files[which]) in str(caught.value)


RIGHT = ["teal", "gold", "teal", "teal"]
PREDICTED = ["teal", "gold", "It is teal.", "gold"]
LAYOUTS = {
    "flat": lambda text: {"resps": [text], "filtered_resps": text},
    "list": lambda text: {"resps": [[text]], "filtered_resps": [text]},
    "list in list": lambda text: {"resps": [[text]], "filtered_resps": [[text]]},
    "deeper": lambda text: {"resps": [[[text]]], "filtered_resps": [[[text]]]},
    "resps alone": lambda text: {"resps": [[text]]},
    "no filtered": lambda text: {"resps": [[text]], "filtered_resps": []},
    "filtered alone": lambda text: {"filtered_resps": [text]},
}
TARGETS = {
    "text": lambda text: text,
    "list": lambda text: [text, "none"],
    "text of a list": lambda text: str([text, "none"]),
    "list in dicts": lambda text: [{"answer": text}],
    "list in list": lambda text: [[text], ["none"]],
    "object": lambda text: {"answer": text},
}


def logged(layout="list", target="text"):
    return [
        {"doc_id": n, "target": TARGETS[target](RIGHT[n]), **LAYOUTS[layout](PREDICTED[n])}
        for n in range(4)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_logged_samples_of_every_layout_are_read_alike(tmp_path, layout, target):
    found = joined(write(tmp_path / "samples_color_2026-01-02T03-04-05.6.jsonl",
                         logged(layout, target)), None)  # fmt: skip
    assert found.task == "color"
    assert [(a.key, a.target, a.text) for a in found.answers] == [
        (str(n), RIGHT[n], PREDICTED[n]) for n in range(4)
    ]
    assert (score(found, "exact").strict, score(found, "exact").lenient) == (0.5, 0.75)


@pytest.mark.parametrize(
    "name", ["20260102_030405_samples_mme_test.jsonl", "samples_mme_test.jsonl"]
)
def test_a_task_is_named_by_its_file(tmp_path, name):
    assert joined(write(tmp_path / name, logged()), None).task == "mme_test"


def test_old_logs_of_lmms_eval_hold_the_samples_under_logs(tmp_path):
    file = tmp_path / "color.json"
    file.write_text(
        json.dumps({"args": {"model": "x"}, "model_configs": {}, "logs": logged()}, indent=1)
    )
    assert score(joined(file, None), "exact").strict == 0.5


def test_every_filter_is_a_set_of_its_own(tmp_path):
    lines = [
        {"doc_id": n, "target": "7", "filter": name, "resps": [["so 7"]], "filtered_resps": [text]}
        for n, (name, text) in itertools.product(
            range(2), (("strict", "[invalid]"), ("flexible", "7"))
        )
    ]  # fmt: skip
    found = read_foreign(write(tmp_path / "samples_sums.jsonl", lines), None, False)
    assert [(each.task, len(each.answers), score(each, "exact").strict) for each in found] == [
        ("sums (strict)", 2, 0),
        ("sums (flexible)", 2, 1),
    ]


def test_several_responses_and_repeated_samples_are_named(tmp_path):
    lines = logged()
    lines[0] |= {"resps": [["teal", "gold"]], "filtered_resps": [["teal", "gold"]]}
    found = joined(write(tmp_path / "a.jsonl", [*lines, lines[2]]), None)
    assert (found.several, found.repeated, len(found.answers)) == (["0"], ["2"], 4)
    assert score(found, "exact").strict == 0.5


CHOICES = ["teal", "gold", "red"]


@pytest.mark.parametrize("is_text", [False, True])
@pytest.mark.parametrize("target", [1, "1", "gold"])
@pytest.mark.parametrize(
    "more",
    [
        {"doc": {"question": "Which?", "choices": CHOICES}},
        {"doc": {"question": "Which?", "choices": {"text": CHOICES, "label": ["A", "B", "C"]}}},
        {"arguments": [["Which?", f" {choice}"] for choice in CHOICES]},
        {"arguments": {f"gen_args_{n}": {"arg_0": "Which?", "arg_1": f" {choice}"}
                       for n, choice in enumerate(CHOICES)}},
    ],
)  # fmt: skip
def test_likelihoods_choose_the_most_likely_option(tmp_path, more, target, is_text):
    pairs = [[[-3.0, False]], [[-1.0, True]], [[-2.0, False]]]
    if is_text:  # newer versions write every value as text
        pairs = [[[str(value), str(greedy)] for value, greedy in pair] for pair in pairs]
    flat = [pair[0] for pair in pairs]
    right = {"doc_id": 0, "target": target, "resps": pairs, "filtered_resps": flat, **more}
    wrong = {**right, "doc_id": 1, "filtered_resps": [flat[1], flat[0], flat[2]]}
    found = joined(write(tmp_path / "samples_arc.jsonl", [right, wrong]), None)
    assert [(each.text, each.target) for each in found.answers] == [
        ("gold", "gold"),
        ("teal", "gold"),
    ]
    assert score(found, "exact").strict == 0.5


def test_infinities_in_a_log_are_no_reason_to_refuse_it(tmp_path):
    line = {"doc_id": 0, "target": 0, "doc": {"choices": ["a b", "c d"]}, "bits": float("nan"),
            "filtered_resps": [[-5.0, False], [float("-inf"), False]]}  # fmt: skip
    assert score(joined(write(tmp_path / "a.jsonl", [line]), None), "exact").strict == 1


def test_annotators_of_a_doc_count_for_vqa_alone(tmp_path):
    people = [{"answer": text} for text in ["red"] * 2 + ["blue"] * 8]
    line = {"doc_id": 0, "doc": {"answers": people}, "target": "blue", "filtered_resps": ["red"]}
    file = write(tmp_path / "samples_vqa.jsonl", [line])
    assert score(joined(file, None, annotators=True), "vqa").strict == pytest.approx(0.6)
    assert score(joined(file, None), "exact").strict == 0


def test_options_of_a_doc_are_options_of_the_question(tmp_path):
    doc = {"question": "Which?", "A": "teal", "B": "gold", "C": None, "answer": "B"}
    line = {"doc_id": 0, "doc": doc, "target": "B", "filtered_resps": ["It is gold."]}
    found = joined(write(tmp_path / "samples_mmbench.jsonl", [line]), None)
    assert found.answers[0].question == "Which?\nA. teal\nB. gold"
    assert (score(found, "option").strict, score(found, "option").lenient) == (0, 1)


TABLE = [
    {"index": "0", "question": "Which?", "A": "teal", "B": "gold", "answer": "A",
     "prediction": "A"},
    {"index": "1", "question": "And?", "A": "teal", "B": "gold", "answer": "B",
     "prediction": "The one with\ttabs, \"quotes\" & gold"},
    {"index": "2", "question": "Where?", "A": "left", "B": "right", "answer": "A",
     "prediction": "B. right"},
]  # fmt: skip


def write_xlsx(path, rows):
    """Write a sheet as other programs do: shared strings, inline strings and numbers."""
    names, shared = list(rows[0]), []
    lines = []
    for number, row in enumerate([dict(zip(names, names, strict=True)), *rows], 1):
        cells = []
        for column, name in enumerate(names):
            place, value = f"{chr(ord('A') + column)}{number}", row.get(name)
            if value is None:
                continue
            if value.isdecimal():
                cells.append(f'<c r="{place}"><v>{value}</v></c>')
            elif column % 2:
                shared.append(value)
                cells.append(f'<c r="{place}" t="s"><v>{len(shared) - 1}</v></c>')
            else:
                cells.append(f'<c r="{place}" t="inlineStr"><is><t>{escape(value)}</t></is></c>')
        lines.append(f'<row r="{number}">{"".join(cells)}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    strings = "".join(f"<si><r><t>{escape(text[:2])}</t></r><r><t>{escape(text[2:])}</t></r></si>"
                      for text in shared)  # fmt: skip
    with zipfile.ZipFile(path, "w") as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{strings}</sst>")
        data = "".join(lines)
        book.writestr("xl/worksheets/sheet1.xml",
                      f"<worksheet {space}><sheetData>{data}</sheetData></worksheet>")  # fmt: skip
    return path


def write_table(path, rows):
    if path.suffix == ".xlsx":
        return write_xlsx(path, rows)
    if path.suffix == ".json":
        return write(path, rows, as_lines=False)
    if path.suffix == ".jsonl":
        return write(path, rows)
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
    table.writeheader()
    table.writerows(rows)
    path.write_text(text.getvalue())
    return path


@pytest.mark.parametrize("suffix", [".xlsx", ".tsv", ".csv", ".json", ".jsonl"])
def test_tables_of_vlmevalkit_are_read_in_all_its_formats(tmp_path, suffix):
    found = joined(write_table(tmp_path / f"llava_MMBench{suffix}", TABLE), None)
    assert [each.key for each in found.answers] == ["0", "1", "2"]
    assert [each.text for each in found.answers] == [row["prediction"] for row in TABLE]
    assert found.answers[0].question == "Which?\nA. teal\nB. gold"
    assert score(found, "option").strict == pytest.approx(1 / 3)
    assert score(found, "option").lenient == pytest.approx(2 / 3)


def test_an_empty_cell_of_xlsx_keeps_its_column(tmp_path):
    rows = [{**TABLE[0], "hint": "h"}, {**TABLE[1], "A": None, "hint": "é\u2028"}]
    records = read_records(write_xlsx(tmp_path / "a.xlsx", rows))
    assert records[1][1] == {k: v for k, v in rows[1].items() if v is not None}
    assert records[0][1] == rows[0]


def test_a_cell_of_xlsx_longer_than_csv_allows_and_its_control_characters(tmp_path):
    rows = [{"id": "1", "answer": "a", "text": "b", "image": "x" * 200_000}]
    assert read_records(write_table(tmp_path / "a.tsv", rows))[0][1] == rows[0]
    (tmp_path / "b.xlsx").write_bytes(
        write_xlsx(tmp_path / "a.xlsx", [{"a": "x_x000D_y"}]).read_bytes()
    )
    assert read_records(tmp_path / "b.xlsx")[0][1] == {"a": "x\ry"}


def test_a_broken_xlsx_or_one_with_entities_is_refused_with_the_way_out(tmp_path):
    file = tmp_path / "a.xlsx"
    file.write_bytes(b"PK no")
    with pytest.raises(ValueError, match=r"a\.xlsx is not a readable xlsx .*: save it as \.tsv"):
        read_records(file)
    with zipfile.ZipFile(file, "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    with pytest.raises(ValueError, match="sheet1.xml has declarations"):
        read_records(file)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Which?", "predict": "teal", "label": "teal"},  # LLaMA-Factory
        {"query": "Which?", "response": "teal", "labels": "teal", "images": ["a.jpg"]},  # ms-swift
        {"question_id": 3, "prompt": "Which?", "text": "teal", "gt_answer": "teal"},
        {"id": "a", "question": "Which?", "answer": "teal", "pred": "teal"},
        {"question": "Which?", "answer": "teal", "model_output": "teal"},
        {"origin_prompt": "x", "question": "Which?", "prediction": "teal", "gold": "teal"},
        {"question": "Which?", "question_id": 1, "answer": "teal", "annotation": ["teal"]},
        {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "x"}],
         "prediction": "teal", "reference": "teal"},
    ],
)  # fmt: skip
def test_records_with_prediction_and_right_answer_need_no_truth(tmp_path, record):
    found = joined(write(tmp_path / "a.jsonl", [record, record]), None)
    assert [(each.question, each.target, each.text) for each in found.answers] == [
        ("Which?", "teal", "teal")
    ] * 2


def test_vqav2_is_scored_from_its_annotations_and_results(tmp_path):
    people = {1: ["red"] * 2 + ["blue"] * 8, 2: ["2"] * 10, 3: ["yes"] * 9 + ["no"]}
    annotations = [
        {
            "question_id": n, "image_id": 7, "multiple_choice_answer": given[-1],
            "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(given, 1)],
        }
        for n, given in people.items()
    ]  # fmt: skip
    truth, results = tmp_path / "annotations.json", tmp_path / "results.json"
    truth.write_text(json.dumps({"info": {}, "license": {}, "annotations": annotations}))
    write(
        results, [{"question_id": 1, "answer": "Red"}, {"question_id": 2, "answer": "two"}], False
    )
    found = joined(results, truth, annotators=True)
    assert found.missing == ["3"]
    assert score(found, "vqa").strict_scores == pytest.approx([0.6, 1, 0])
    # Another scorer compares with the answer that was agreed on.
    assert [each.right_answers for each in joined(results, truth).answers][0] == ("blue",)


@pytest.mark.parametrize(
    "prompt",
    [
        "What is the brand?\nAnswer the question using a single word or phrase.",
        "What is the brand?\nReference OCR token: A, B\nAnswer the question using a single word.",
        "Reference OCR token: A, B\nWhat is the brand?\nAnswer the question using a single word.",
        "OCR tokens: A, B. Question: What is the brand? Short answer:",
        "What is the brand?",
    ],
)
def test_textvqa_is_matched_by_image_and_question(tmp_path, prompt):
    data = [
        {"question_id": 34602 + n, "image_id": image, "question": question, "answers": [right] * 10}
        for n, (image, question, right) in enumerate([
            ("0054c91397f2fe05", "what is the brand?", "dakota"),
            ("0054c91397f2fe05", "what is the year?", "1998"),
            ("005635e119b9f32f", "what is the brand?", "nokia"),
        ])
    ]  # fmt: skip
    truth = tmp_path / "TextVQA_0.5.1_val.json"
    truth.write_text(json.dumps({"dataset_type": "val", "data": data}))
    answers = write(tmp_path / "llava.jsonl", [
        {"question_id": "005635e119b9f32f", "prompt": prompt, "text": "Nokia"},
        {"question_id": "0054c91397f2fe05", "prompt": prompt, "text": "nokia"},
        {"question_id": "0054c91397f2fe05", "prompt": "What is the year?\nX.", "text": "1,998"},
    ])  # fmt: skip
    found = joined(answers, truth, annotators=True)
    assert (found.missing, found.unknown, found.differing) == ([], [], [])
    assert score(found, "textvqa").strict_scores == [0, 1, 1]


def test_gqa_questions_are_an_object_by_id(tmp_path):
    truth = tmp_path / "testdev_balanced_questions.json"
    truth.write_text(json.dumps({
        "201307251": {"imageId": "n1", "question": "Is it red?", "answer": "yes"},
        "201640614": {"imageId": "n2", "question": "What?", "answer": "chair", "fullAnswer": "A."},
    }))  # fmt: skip
    results = write(tmp_path / "testdev_predictions.json", [
        {"questionId": "201640614", "prediction": "chair"},
        {"questionId": "201307251", "prediction": "no"},
    ], as_lines=False)  # fmt: skip
    assert score(joined(results, truth), "exact").strict_scores == [0, 1]


def test_scienceqa_counts_its_choices_from_0_and_only_the_split_that_was_answered(tmp_path):
    truth = tmp_path / "problems.json"
    problem = {"question": "Which?", "choices": ["teal", "gold"], "hint": ""}
    truth.write_text(json.dumps({
        "1": {**problem, "answer": 0, "split": "train"},
        "2": {**problem, "answer": 1, "split": "test"},
        "3": {**problem, "answer": 0, "split": "test"},
        "4": {**problem, "answer": 0, "split": "test"},
    }))  # fmt: skip
    answers = write(tmp_path / "a.jsonl", [
        {"question_id": "2", "prompt": "Which?\nA. teal\nB. gold", "text": "B"},
        {"question_id": "3", "prompt": "Which?\nA. teal\nB. gold", "text": "teal"},
    ])  # fmt: skip
    found = joined(answers, truth)
    assert [each.target for each in found.answers] == ["B", "A", "A"]
    assert found.missing == ["4"]
    assert score(found, "option").strict_scores == [1, 0, 0]
    assert score(found, "option").lenient_scores == [1, 1, 0]


def test_pope_labels_stand_beside_the_questions(tmp_path):
    truth = write(tmp_path / "coco_pope_random.json", [
        {"question_id": n, "image": f"{n}.jpg", "text": "Is there a dog?", "label": label}
        for n, label in enumerate(["yes", "no", "no"])
    ])  # fmt: skip
    answers = write(tmp_path / "a.jsonl", [
        {"question_id": n, "prompt": "Is there a dog?\nAnswer shortly.", "text": text}
        for n, text in enumerate(["Yes", "No, none.", "Yes."])
    ])  # fmt: skip
    found = joined(answers, truth)
    assert found.differing == []
    extras = score(found, "pope").extras
    assert (extras["accuracy"], extras["precision"], extras["recall"]) == pytest.approx(
        (2 / 3, 1 / 2, 1)
    )
    with pytest.raises(UnknownLayout, match="none of them is known as a prediction"):
        read_foreign(truth, None, False)


MME = [
    {"question_id": "color/1.jpg", "category": "color", "question": "Is it red?", "answer": "Yes"},
    {"question_id": "color/1.jpg", "category": "color", "question": "Is it blue?", "answer": "No"},
    {"question_id": "OCR/1.jpg", "category": "OCR", "question": "Is it red?", "answer": "Yes"},
    {"question_id": "OCR/1.jpg", "category": "OCR", "question": "Is it blue?", "answer": "No"},
]
MME_EXTRAS = {"color": 200.0, "OCR": 50.0, "perception": 250.0, "total": 250.0}


@pytest.mark.parametrize("program", ["llava", "lmms-eval", "vlmevalkit", "one file"])
def test_mme_is_grouped_by_category_and_image_in_the_files_of_every_program(tmp_path, program):
    said = ["yes", "no", "Yes.", "Yes"]
    file, truth = tmp_path / "a.jsonl", None
    if program == "llava":
        truth = write(tmp_path / "truth.jsonl", MME)
        write(file, [
            {"question_id": row["question_id"], "prompt": f"{row['question']}\nAnswer shortly.",
             "text": text} for row, text in zip(MME, said, strict=True)
        ][::-1])  # fmt: skip
    elif program == "lmms-eval":
        write(file, [{"doc_id": n, "doc": row, "target": row["answer"], "filtered_resps": [text]}
                     for n, (row, text) in enumerate(zip(MME, said, strict=True))])  # fmt: skip
    elif program == "vlmevalkit":
        write(file, [
            {"index": n, "category": row["category"], "image_path": row["question_id"],
             "question": row["question"], "answer": row["answer"], "prediction": text}
            for n, (row, text) in enumerate(zip(MME, said, strict=True))
        ])  # fmt: skip
    else:
        write(file, [{**row, "prediction": text} for row, text in zip(MME, said, strict=True)])
    found = joined(file, truth)
    extras = score(found, "mme").extras
    assert {name: extras[name] for name in MME_EXTRAS} == pytest.approx(MME_EXTRAS)
    assert extras["OCR_accuracy"] == 0.5
    assert extras["OCR_accuracy+"] == 0


def test_captions_of_one_image_are_alternatives(tmp_path):
    truth = tmp_path / "captions.json"
    captions = [(1, "a red bus"), (2, "two dogs"), (1, "a bus")]
    annotations = [{"id": n, "image_id": i, "caption": c} for n, (i, c) in enumerate(captions)]
    truth.write_text(json.dumps({"images": [{"id": 1}], "annotations": annotations}))
    results = write(tmp_path / "results.json", [{"image_id": 1, "caption": "a bus"}], False)
    found = joined(results, truth)
    assert [each.references for each in found.answers] == [("a red bus", "a bus"), ("two dogs",)]
    assert found.missing == ["2"]


def test_options_of_the_prompt_count_where_the_truth_lists_none(tmp_path):
    truth = write(tmp_path / "t.json", [{"id": 1, "question": "Which color?", "answer": "B"}])
    prompt = "<image>\nWhich color?\nA. teal\nB. gold\nAnswer with the letter."
    answers = write(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": prompt, "text": "gold"}])
    assert score(joined(answers, truth), "option").lenient == 1


def test_vizwiz_names_its_questions_by_image(tmp_path):
    people = [{"answer": "red", "answer_confidence": "yes"}] * 10
    question = {"image": "a.jpg", "question": "Which?", "answers": people, "answerable": 1}
    truth = write(tmp_path / "val.json", [question], as_lines=False)
    results = write(tmp_path / "r.json", [{"image": "a.jpg", "answer": "Red."}], as_lines=False)
    assert score(joined(results, truth, annotators=True), "vqa").strict == 1


def test_an_answer_that_a_filter_emptied_stays_empty(tmp_path):
    line = {"doc_id": 0, "target": "teal", "resps": [["teal"]], "filtered_resps": ""}
    assert joined(write(tmp_path / "a.jsonl", [line]), None).answers[0].text == ""


def test_answers_by_id_are_right_answers(tmp_path):
    truth = tmp_path / "right.json"
    truth.write_text(json.dumps({"a": "teal", "b": ["gold", "yellow"]}))
    answers = write(tmp_path / "a.jsonl", [{"question_id": "b", "text": "yellow"}])
    assert score(joined(answers, truth), "exact").strict == 0.5


def test_an_id_with_another_question_is_named(tmp_path):
    truth = write(
        tmp_path / "t.json", [{"question_id": 1, "question": "Is it red?", "answer": "yes"}]
    )
    answers = write(
        tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "How many?", "text": "yes"}]
    )
    assert joined(answers, truth).differing == ["1"]


def test_an_object_of_another_layout_is_named_with_its_keys(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps({"results": {"a": {"acc": 1}}, "date": 1.5, "configs": {}}, indent=1)
    )
    with pytest.raises(UnknownLayout, match="one object with the keys results, date, configs: exp"):
        read_records(file)
