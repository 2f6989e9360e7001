"""``mmcl rescore``: answers of a run, of one file, of a LLaVA-style repository."""

import json

import pytest

from mmcl.cli import COMMANDS, main
from mmcl.evaluation import AccuracyMatrix, Column, Prediction, predictions_path, write_predictions


@pytest.fixture
def give(tmp_path, capsys, monkeypatch):
    """Give a command in an empty folder; return status and output."""
    monkeypatch.chdir(tmp_path)

    def give(*words):
        status = main(["rescore", *map(str, words)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return give


@pytest.fixture
def run(tmp_path):
    """A run of two instruction tasks and an eval-only task of classes, three cells evaluated."""
    folder = tmp_path / "runs" / "mine"
    columns = [
        Column("colour", "instruction", "exact/1", 4),
        Column("count", "instruction", "vqa/1", 2),
    ]
    matrix = AccuracyMatrix(
        "scenes", "task", columns, [Column("letters", "classification", size=2)]
    )
    matrix.set(1, 0, 0.5)
    matrix.write(folder / "matrix.json")
    colours = [
        Prediction("0", "red", "Red.", True, references=("red", "crimson"), question="Which?"),
        Prediction("1", "red", "crimson", False, references=("red", "crimson")),
        Prediction("2", "blue", "It is blue", True),
        Prediction("3", "blue", "", True),
    ]
    write_predictions(predictions_path(folder, 1, 0), colours)
    people = ("3",) * 2 + ("4",) * 8
    counts = [
        Prediction("0", "3", "three", False, references=people),
        Prediction("1", "2", "2", False),
    ]
    write_predictions(predictions_path(folder, 1, 1), counts)
    write_predictions(predictions_path(folder, 2, 2), [Prediction("0", "A", "a", False)])
    return folder


def row_of(out, name):
    return next(line.split() for line in out.splitlines() if name in line.split())


def test_a_run_is_scored_cell_by_cell_with_the_recorded_scorers(give, run):
    status, out, err = give("mine")
    assert (status, err) == (0, "")
    assert out.split()[:7] == ["after", "task", "n", "strict", "lenient", "recorded", "scorer"]
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert rows[0] == ["colour", "colour", "4", "50.00", "75.00", "50.00", "exact/1"]
    assert rows[1] == ["colour", "count", "2", "80.00", "80.00", "-", "vqa/1"]
    # A class that differs in case alone is another class.
    assert rows[2] == ["count", "letters", "1", "0.00", "0.00", "-", "accuracy"]


@pytest.mark.parametrize("place", ["runs/mine", "runs/mine/answers", "mine"])
def test_run_folder_answers_folder_and_name_are_the_same(give, run, place):
    assert give(place)[1] == give("runs/mine")[1]


def test_one_file_knows_its_task(give, run):
    status, out, _ = give(predictions_path(run, 1, 0))
    assert status == 0
    assert row_of(out, "colour")[2:5] == ["4", "50.00", "75.00"]


def test_another_scorer_can_be_chosen(give, run):
    _, out, _ = give(predictions_path(run, 1, 0), "--scorer", "contains")
    assert row_of(out, "colour")[2:] == ["4", "75.00", "75.00", "50.00", "contains/1"]
    _, out, _ = give(run, "--scorer", "exact")
    assert row_of(out, "letters")[2:] == ["1", "100.00", "100.00", "-", "exact/1"]


def test_json_has_all_digits_and_the_extras(give, run):
    status, out, _ = give(predictions_path(run, 1, 0), "--json", "--scorer", "fraction")
    assert status == 0
    (cell,) = json.loads(out)
    assert cell["strict"] == 0.5
    assert cell["lenient"] == 0.75
    assert cell["recorded"] == 0.5
    assert (cell["n"], cell["scorer"], cell["task"]) == (4, "fraction/1", "colour")
    assert cell["extras"] == {"jaccard": 0.5}
    assert cell["missing"] == cell["repeated"] == cell["unknown"] == []


def test_nothing_is_written(give, run):
    def files():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = files()
    give("mine")
    assert files() == before


def test_an_empty_cell_has_no_score(give, run):
    write_predictions(predictions_path(run, 2, 0), [])
    assert ["count", "colour", "0", "-", "-", "-", "exact/1"] in [
        line.split() for line in give("mine")[1].splitlines()
    ]


@pytest.fixture
def llava(tmp_path):
    """Answers of another repository: two of four questions, one twice, one unknown."""
    answers, truth = tmp_path / "merge.jsonl", tmp_path / "test.json"
    predicted = [(1, "Red"), (2, "It is blue"), (1, "green"), (77, "x")]
    lines = [json.dumps({"question_id": n, "prompt": "?", "text": text}) for n, text in predicted]
    answers.write_text("\n".join(lines))
    right = ["red", "blue", "grey", "grey"]
    questions = [{"question_id": n, "text": "?", "answer": text} for n, text in enumerate(right, 1)]
    truth.write_text(json.dumps(questions))
    return answers, truth


def test_answers_of_llava_are_scored_over_every_question(give, llava):
    answers, truth = llava
    status, out, err = give(answers, "--truth", truth, "--scorer", "exact")
    assert (status, err) == (0, "")
    assert row_of(out, "merge") == ["merge", "4", "25.00", "50.00", "exact/1"]
    assert "2 questions have no prediction and count 0: 3, 4" in out
    assert "1 questions have several predictions, the first counts: 1" in out
    assert "1 predictions are for questions that the truth lacks and do not count: 77" in out


def test_json_names_every_missing_answer(give, llava):
    answers, truth = llava
    truth.write_text(json.dumps([{"question_id": n, "answer": "a"} for n in range(30, 60)]))
    _, out, _ = give(answers, "--truth", truth, "--scorer", "exact")
    assert "30 questions have no prediction and count 0: 30, 31," in out
    assert "39 and 20 more (--json lists all)" in out
    (cell,) = json.loads(give(answers, "--truth", truth, "--scorer", "exact", "--json")[1])
    assert cell["missing"] == [str(n) for n in range(30, 60)]
    assert cell["strict"] == 0


def test_a_mistake_is_one_sentence_and_status_2(give, run, llava):
    answers, truth = llava
    cell = predictions_path(run, 1, 0)
    lonely = run / "lonely.jsonl"
    lonely.write_bytes(cell.read_bytes())
    for words, sentence in [
        (["nowhere"], "there are no predictions at nowhere: give a JSONL file"),
        (
            [run / "answers" / "row_01"],
            "holds no predictions (row_00/col_00.jsonl ...): give a run",
        ),
        (["mine", "--scorer", "blue"], "there is no scorer 'blue': choose one of exact"),
        (["mine", "--scorer", "exact/9"], "there is no scorer 'exact/9', only exact/1"),
        ([lonely], "lonely.jsonl: give --scorer, one of exact"),
        ([answers], "without right answers, and there is no --truth: give --truth test.json"),
        ([answers, "--truth", "no.json"], "no.json is not a file: give --truth"),
        ([answers, "--truth", truth], "merge.jsonl: give --scorer"),
        (["mine", "--truth", truth], "holds the right answers: leave --truth out"),
        (["mine", "--scorer", "box"], "cannot be scored by box: the scorer box got the reference"),
        (["mine", "--scorers"], "usage: mmcl rescore"),
        ([], "usage: mmcl rescore"),
    ]:
        status, out, err = give(*words)
        assert (status, out) == (2, ""), words
        assert sentence in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_a_recorded_version_that_is_gone_is_named(give, run):
    text = (run / "matrix.json").read_text().replace("exact/1", "exact/0")
    (run / "matrix.json").write_text(text)
    status, _, err = give("mine")
    assert status == 2
    assert "there is no scorer 'exact/0', only exact/1" in err
    assert give("mine", "--scorer", "vqa")[0] == 0


def test_a_broken_line_is_named(give, run):
    cell = predictions_path(run, 1, 0)
    cell.write_text(cell.read_text() + "{")
    status, _, err = give("mine")
    assert status == 1
    assert "col_00.jsonl line 5 is not valid JSON" in err


def logged(folder, name, texts, **more):
    """Write samples as lm-eval logs them; the right answer is always teal."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"doc_id": n, "target": "teal", "resps": [[text]], "filtered_resps": [text], **more}
        for n, text in enumerate(texts)
    ]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_folder_of_logged_samples_has_a_row_for_every_task(give, tmp_path):
    folder = tmp_path / "logs"
    stamp = "2026-01-02T03-04-05.678901"
    logged(folder, f"samples_color_{stamp}.jsonl", ["teal", "It is teal"])
    logged(folder, "20260102_030405_samples_mme_color.jsonl", ["teal", "teal", "red"])
    (folder / "sub").mkdir()
    logged(folder / "sub", "samples_shape.jsonl", ["teal"])
    results = {"results": {"color": {"exact_match": 0.5}}, "date": 1.0, "configs": {}}
    (folder / f"results_{stamp}.json").write_text(json.dumps(results, indent=1))
    status, out, err = give(folder, "--scorer", "exact")
    assert (status, err) == (0, "")
    assert row_of(out, "color") == ["color", "2", "50.00", "100.00", "exact/1"]
    assert row_of(out, "mme_color") == ["mme_color", "3", "66.67", "66.67", "exact/1"]
    assert row_of(out, "sub/shape") == ["sub/shape", "1", "100.00", "100.00", "exact/1"]
    assert f"left out: {folder}/results_{stamp}.json holds one object with the keys results" in out


def test_json_has_fractions_and_percent(give, tmp_path):
    logged(tmp_path, "samples_a.jsonl", ["teal", "It is teal", "red"])
    (cell,) = json.loads(give("samples_a.jsonl", "--scorer", "exact", "--json")[1])
    assert cell["strict"] == pytest.approx(1 / 3)
    assert cell["percent"] == {"strict": 33.33, "lenient": 66.67}


def test_a_folder_of_llavas_answers_is_scored_with_one_truth(give, llava):
    answers, truth = llava
    folder = answers.parent / "answers_of_tasks"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_bytes(answers.read_bytes())
    status, out, _ = give(folder, "--truth", truth, "--scorer", "exact")
    assert status == 0
    assert row_of(out, "one")[1:] == row_of(out, "two")[1:] == ["4", "25.00", "50.00", "exact/1"]


def test_what_cannot_be_scored_names_what_was_found(give, tmp_path):
    logged(tmp_path / "logs", "samples_a.jsonl", ["yes"])
    odd, empty = tmp_path / "odd.jsonl", tmp_path / "empty.tsv"
    odd.write_text('{"width": 3, "height": 4}\n{"width": 1, "height": 2}\n')
    empty.write_text("index\tprediction\n")
    lone = tmp_path / "lone.json"
    lone.write_text('{"a": {"b": 1}, "c": 2}')
    (tmp_path / "images").mkdir()
    for words, sentence in [
        ([odd, "--scorer", "exact"], "the keys width, height, and none of them is known as a pred"),
        ([empty, "--scorer", "exact"], "empty.tsv holds no records"),
        ([lone, "--scorer", "exact"], "one object with the keys a, c: expected a list of objects"),
        (["logs"], "samples_a.jsonl: give --scorer, one of exact"),
        (["logs", "--scorer", "mme"], "lacks the category and image of questions"),
        (["logs", "--scorer", "pope"], "cannot be scored by pope: the scorer pope got the ref"),
        (["logs", "--scorer", "exact", "--truth", odd], "holds the right answers: leave --truth"),
        (["images", "--scorer", "exact"], "holds no predictions (row_00/col_00.jsonl ...): give"),
    ]:
        status, out, err = give(*words)
        assert (status, out) == (2, ""), words
        assert sentence in err, words
        assert err.count("\n") == 1


def test_samples_with_several_responses_are_told(give, tmp_path):
    logged(tmp_path, "samples_a.jsonl", ["teal"], filtered_resps=["teal", "red"])
    out = give("samples_a.jsonl", "--scorer", "exact")[1]
    assert "1 samples have several responses, the first counts: 0" in out


def test_the_published_metrics_stand_beside_the_score(give, tmp_path):
    questions = [("yes", "Yes"), ("no", "Yes, it is"), ("no", "No")]
    lines = [{"id": n, "answer": a, "prediction": p} for n, (a, p) in enumerate(questions)]
    (tmp_path / "pope.json").write_text(json.dumps(lines))
    out = give("pope.json", "--scorer", "pope")[1]
    assert "precision 0.5000, recall 1.0000, f1 0.6667, yes_ratio 0.6667" in out


def test_names_from_a_file_cannot_steer_the_terminal(give, llava):
    answers, truth = llava
    truth.write_text(json.dumps([{"question_id": "\x1b[2J\ud800", "answer": "a"}]))
    for more in ([], ["--json"]):
        status, out, _ = give(answers, "--truth", truth, "--scorer", "exact", *more)
        assert status == 0
        assert "\x1b" not in out


def test_the_command_has_help_and_stands_in_the_overview(give):
    status, out, _ = give("--help")
    assert status == 0
    assert "--truth" in out
    assert "caption" in out
    assert "rescore" in COMMANDS
