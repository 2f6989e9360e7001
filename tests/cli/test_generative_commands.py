"""Commands on a model that answers: check, the run, evaluate, report, compare; errors."""

import datetime
import json

import pytest
import torch
import yaml

from mmcl.evaluation import AccuracyMatrix
from mmcl.lightning.continual_run import ContinualRun
from mmcl.models.hf_vlm import loading
from tests.cli.test_check import line
from tests.data.small_stream import write_stream
from tests.lightning.small_runs import small_model

BEFORE = "small_run"
EVERY = pytest.mark.parametrize("command", [["check"], [], ["fit"]])


def refused(given, *wanted):
    """The command failed with all that is wanted in its message, once and without a trace."""
    status, out, err = given
    assert status != 0
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    for part in wanted:
        assert err.count(part) == 1, (part, err)
    return True


def test_check_answers_rows_of_every_task_and_writes_nothing(asking):
    status, out, err = asking.run(command=["check"])
    assert (status, err) == (0, "")
    for letter in "abc":
        kind, training, test, steps, score, sign = line(out, f"ask-{letter}").split()
        assert (kind, training, test, steps, sign) == ("instruction", "8", "4", "1", "%")
        assert 0 <= int(score) <= 100
    assert line(out, "stream") == "quiz, domain-incremental, 3 tasks"
    assert line(out, "model, strategy") == "ImageTextToText chat, LoRA"
    assert not (asking.folder / "runs").exists()


def clip(config):
    config["model"]["model"] = {
        "class_path": "mmcl.models.OpenCLIP", "init_args": {"model": "small.json"}
    }  # fmt: skip
    config["model"]["strategy"] = {"class_path": "mmcl.strategies.Finetune"}


@EVERY
def test_a_clip_is_refused_for_questions(asking, command):
    small_model(asking.folder)
    asking.ask(change=clip)
    output = asking.run(command=command)
    assert refused(
        output,
        "'quiz' has question-answering tasks ('ask-a', 'ask-b', 'ask-c'), and OpenCLIP cannot",
    )


@EVERY
def test_a_generative_model_is_refused_for_classes(asking, command):
    write_stream(asking.folder / "stream", (8, 8))
    output = asking.run("--data.stream", "stream/small.yaml", command=command)
    assert refused(
        output, "tasks of task_type 'classification' ('task-a', 'task-b'), and ImageTextToText"
    )


@EVERY
def test_every_unknown_scorer_is_named_with_the_other_errors_of_a_card(asking, command):
    def spoil(card):
        card["tasks"][0]["scorer"], card["tasks"][2]["scorer"] = "exakt", "nothing like it"
        card["tasks"][1]["decoding"] = "candidates"

    asking.rewrite_card(spoil)
    output = asking.run(command=command)
    assert refused(
        output,
        "3 errors",
        "task 0 ('ask-a') has the unknown scorer 'exakt': did you mean 'exact'?",
        "task 1 ('ask-b') lets candidates compete (decoding) but has task_type 'instruction' and 0 "
        "'classes'",
        "task 2 ('ask-c') has the unknown scorer 'nothing like it': known: exact, contains",
    )


@EVERY
def test_a_model_that_is_not_there_is_named(asking, command):
    output = asking.run("--model.model.model", "chatt/", command=command)
    assert refused(output, "there is no folder chatt/: give a local folder")


@EVERY
def test_a_misspelt_model_class_is_shown_the_nearest(asking, command):
    text = asking.config.read_text().replace("ImageTextToText", "ImageTextToTex")
    asking.config.write_text(text)
    output = asking.run(command=command)
    assert output[0] == 2
    assert refused(output, "did you mean 'ImageTextToText'?")


def test_a_run_names_its_scores_and_says_what_is_right_in_any_form(asking):
    status, out, err = asking.run()
    assert (status, err) == (0, "")
    assert "score exact/1: column 1, 3\nscore contains/1: column 2" in out
    last = next(row for row in out.splitlines() if row.startswith("lenient average accuracy"))
    assert "lenient forgetting" in last
    assert "format gap" in last
    summary = json.loads((asking.results / "summary.json").read_text())
    metrics = {metric["name"]: metric for metric in summary["metrics"]}
    assert metrics["lenient average accuracy"]["definition"].startswith("1/T sum over i of l[T]")
    assert summary["versions"]["scorer exact"] == "exact/1"
    assert summary["versions"]["scorer contains"] == "contains/1"


def rewrite_scores(folder, strict, lenient):
    """Write other scores into a finished run: [row][column]."""
    for name, values in (("matrix", strict), ("lenient", lenient)):
        matrix = AccuracyMatrix.read(folder / f"{name}.json")
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                matrix.set(row, column, value)
        matrix.write(folder / f"{name}.json")


STRICT = [[0, 0, 0], [0.75, 0, 0], [0.25, 1, 0], [0, 0.5, 1]]
LENIENT = [[0.5, 0, 0], [1, 0, 0], [0.75, 1, 0], [0.75, 0.75, 1]]


@pytest.mark.slow
def test_report_shows_the_lenient_scores_as_text_and_leaves_csv_and_latex(answered):
    rewrite_scores(answered.results, STRICT, LENIENT)
    out = answered.give("report", BEFORE)[1]
    assert "lenient average accuracy 83.3   lenient forgetting +25.0   format gap +33.3" in out
    csv = answered.give("report", BEFORE, "--as", "csv")[1]
    assert csv.splitlines()[:2] == ["after,ask-a,ask-b,ask-c", "zero-shot,0.0,0.0,0.0"]
    latex = answered.give("report", BEFORE, "--as", "latex")[1]
    assert r"ask-c & 0.0 & 50.0 & \textbf{100.0} \\" in latex


def test_evaluate_scores_leniently_what_it_scores_and_nothing_else(answered):
    own = AccuracyMatrix.read(answered.results / "matrix.json")
    lenient = AccuracyMatrix.read(answered.results / "lenient.json")
    before = (answered.results / "lenient.json").read_bytes()
    assert answered.give("evaluate", BEFORE, "--after_task", "1", "--tasks", "0-2")[0] == 0
    status, out, err = answered.give("evaluate", BEFORE, "--after_task", "3", "--tasks", "1")
    assert (status, err) == (0, "")
    assert "score exact/1: column 1, 3" in out
    folder = answered.results / "evaluation"
    for name, want in (("matrix", own), ("lenient", lenient)):
        again = AccuracyMatrix.read(folder / f"{name}.json")
        assert again.get(3, 1) == want.get(3, 1)
        assert again.missing() == [
            (row, column) for row in range(4) for column in range(3) if (row, column) != (3, 1)
        ]
    assert (answered.results / "lenient.json").read_bytes() == before


def test_compare_has_a_column_for_scores_in_any_form(answered):
    status, out, err = answered.give("compare", BEFORE, "--out", "both")
    assert (status, err) == (0, "")
    assert "lenient" in out
    table = (answered.folder / "both" / "comparison.csv").read_text().splitlines()
    assert table[0].endswith("lenient average accuracy mean,lenient average accuracy deviation")
    assert "lenient average accuracy, %" in (
        answered.folder / "both" / "comparison.html"
    ).read_text()  # fmt: skip


def test_a_run_over_classes_knows_nothing_of_forms(learned):
    assert not (learned.results / "lenient.json").exists()
    assert "lenient" not in (learned.results / "summary.json").read_text()
    out = learned.give("evaluate", BEFORE, "--after_task", "3")[1]
    assert "lenient" not in out
    assert "score" not in out
    out = learned.give("compare", BEFORE, "--out", "both")[1]
    assert "lenient" not in out + (learned.folder / "both" / "comparison.html").read_text()


@pytest.mark.slow
def test_the_page_of_a_finished_run_shows_questions_answers_and_the_form(answered):
    rewrite_scores(answered.results, STRICT, LENIENT)
    (answered.results / "summary.json").unlink()
    answered.give("report", BEFORE)
    page = (answered.results / "report.html").read_text("utf-8")
    for part in (
        "Format lost, knowledge kept", "What colour is it?", "Name the colour of the thing.",
        "lenient average accuracy", "ask-b · contains/1", 'class="samples questions"',
    ):  # fmt: skip
        assert part in page, part
    assert yaml.safe_load((answered.results / "config.yaml").read_text())["model"]


@pytest.mark.slow
def test_a_run_resumed_on_another_day_asks_with_the_date_of_its_first_start(asking, monkeypatch):
    template = asking.folder / "chat" / "chat_template.jinja"
    dated = "{{ strftime_now('%d') | int % 7 }} {{ strftime_now('%b') }} " + template.read_text()
    template.write_text(dated)
    days = {"now": "2026-12-01"}

    class Clock(datetime.date):
        @classmethod
        def today(cls):
            return datetime.date.fromisoformat(days["now"])

    monkeypatch.setattr(loading, "date", Clock)
    assert asking.run("--run_name", "alone")[0] == 0
    train_task = ContinualRun._train_task

    def stopped(run, module, state, index):
        if index == 1:
            raise KeyboardInterrupt
        return train_task(run, module, state, index)

    monkeypatch.setattr(ContinualRun, "_train_task", stopped)
    assert asking.run("--run_name", "stopped")[0] == 130
    monkeypatch.setattr(ContinualRun, "_train_task", train_task)
    days["now"] = "2027-01-06"
    status, out, _ = asking.run("--run_name", "stopped")
    assert status == 0
    assert "the chat template writes the date 2026-12-01, the day of the first start" in out
    assert asking.run("--run_name", "later")[0] == 0
    states = {
        name: torch.load(
            asking.folder / "runs" / name / "checkpoints" / "task_02.ckpt", weights_only=True
        )["state_dict"]
        for name in ("alone", "stopped", "later")
    }
    assert states["alone"].keys() == states["stopped"].keys()
    for name, value in states["alone"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states["stopped"][name]), name
    key = "model.template_date"
    assert bytes(states["stopped"][key].tolist()).decode() == "2026-12-01"
    assert bytes(states["later"][key].tolist()).decode() == "2027-01-06"
    texts = [n for n, v in states["alone"].items() if n != key and isinstance(v, torch.Tensor)]
    assert any(not torch.equal(states["alone"][n], states["later"][n]) for n in texts)
    inputs = json.loads((asking.folder / "runs" / "stopped" / "inputs.json").read_text())
    assert inputs["template_date"] == "2026-12-01"
