"""Commands on finished runs: evaluate, report, compare, export."""

import csv
import json

import pytest
import torch

from mmcl.evaluation import AccuracyMatrix

BEFORE = "small_run"


def test_evaluate_scores_stored_checkpoints_as_the_run_did(learned):
    own = AccuracyMatrix.read(learned.results / "matrix.json")
    before = (learned.results / "matrix.json").read_bytes()
    status, out, err = learned.give("evaluate", BEFORE, "--after_task", "0,2-3", "--tasks", "1")
    assert (status, err) == (0, "")
    assert "after, %" in out
    again = AccuracyMatrix.read(learned.results / "evaluation" / "matrix.json")
    for row in (0, 2, 3):
        assert again.get(row, 1) == own.get(row, 1)
    assert again.get(1, 1) is None
    assert again.get(2, 0) is None
    assert (learned.results / "matrix.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--after_task", "7"], "--after_task has [7]: give 0 to 3"),
        (["--tasks", "x"], "--tasks is 'x': give numbers such as 3, 0-5 or 1,4"),
        (["--tasks", "3-1"], "--tasks is '3-1'"),
        (["--after", "1", "--taskss", "2"], "there is no option --taskss"),
        (["--rows", "1"], "the option --rows is called --after_task now"),
        (["--columns=2"], "the option --columns is called --tasks now"),
    ],
)
def test_evaluate_says_which_cells_there_are(learned, words, wanted):
    status, _, err = learned.give("evaluate", BEFORE, *words)
    assert status != 0
    assert wanted in err


def test_evaluate_on_a_run_that_is_not_there(desk):
    status, _, err = desk.give("evaluate", "nowhere")
    assert status == 1
    assert err.startswith("error: there is no run nowhere: give a run directory")


def test_a_run_of_the_old_form_is_refused_with_the_new_key(learned):
    state = json.loads((learned.results / "run.json").read_text())
    state["done"] = state.pop("finished_tasks")
    (learned.results / "run.json").write_text(json.dumps(state))
    status, _, err = learned.give("evaluate", BEFORE)
    assert status == 1
    assert "run.json is not a run state (the key 'done' is called 'finished_tasks' now)" in err


def test_a_deleted_checkpoint_is_named(learned):
    (learned.results / "checkpoints" / "task_00.ckpt").unlink()
    status, _, err = learned.give("evaluate", BEFORE, "--after_task", "1")
    assert status == 1
    assert "task_00.ckpt is missing: restore it, or choose another state (--after_task)" in err


@pytest.mark.slow
def test_report_writes_the_page_again_and_prints_the_table(learned):
    page = learned.results / "report.html"
    page.unlink(missing_ok=True)
    status, out, err = learned.give("report", BEFORE)
    assert (status, err) == (0, "")
    assert "task-a" in out
    assert "report: runs/small_run/report.html" in out
    assert "per class: runs/small_run/classes.csv, runs/small_run/confusion.csv" in out
    assert "<html" in page.read_text()


@pytest.mark.slow
def test_report_gives_csv_and_latex(learned):
    csv = learned.give("report", BEFORE, "--as", "csv")[1]
    assert csv.splitlines()[0].endswith("task-a,task-b,task-c")
    assert r"\begin{tabular}" in learned.give("report", BEFORE, "--as", "latex")[1]


def test_report_shows_classes_after_an_earlier_task(learned):
    status, _, err = learned.give("report", BEFORE, "--after_task", "2")
    assert (status, err) == (0, "")
    head, *rows = csv.reader((learned.results / "confusion.csv").read_text().splitlines())
    assert head[0] == "target, predicted after task-b"
    matrix = AccuracyMatrix.read(learned.results / "matrix.json")
    right = sum(int(row[number]) for number, row in enumerate(rows, 1))
    wanted = sum(matrix.get(2, task) * matrix.columns[task].size for task in (0, 1))
    assert right == round(wanted)
    assert sum(int(count) for row in rows for count in row[1:]) == sum(
        column.size for column in matrix.columns[:2]
    )


def test_report_refuses_classes_after_a_task_that_is_not_there(learned):
    status, _, err = learned.give("report", BEFORE, "--after_task", "4")
    assert status == 1
    assert "after_task is 4, and 3 tasks are measured" in err


def test_report_on_a_run_that_was_only_begun_says_so(desk):
    desk.results.mkdir(parents=True)
    (desk.results / "config.yaml").write_text("name: begun\n")
    status, _, err = desk.give("report", BEFORE)
    assert status == 1
    assert "matrix.json" in err


@pytest.mark.slow
def test_compare_shows_mean_and_deviation_over_seeds(learned):
    assert learned.run("--seed_everything", "1")[0] == 0
    status, out, err = learned.give("compare", BEFORE, "small_run-seed1", "--out", "both")
    assert (status, err) == (0, "")
    row = next(line for line in out.splitlines() if line.startswith("Finetune"))
    assert row.split()[1] == "2"
    assert "±" in row
    assert {path.suffix for path in (learned.folder / "both").rglob("*")} >= {".html"}


def test_compare_names_the_run_that_is_not_there(learned):
    status, _, err = learned.give("compare", BEFORE, "nowhere")
    assert status == 1
    assert "there is no run nowhere" in err


def test_export_writes_weights_that_another_run_can_begin_with(learned):
    assert learned.give("export", BEFORE, "learned.safetensors")[0] == 0
    words = ["--model.model.pretrained", "learned.safetensors", "--run_name", "next"]
    assert learned.run(*words)[0] == 0
    first = AccuracyMatrix.read(learned.results / "matrix.json")
    second = AccuracyMatrix.read(learned.folder / "runs" / "next" / "matrix.json")
    kept = torch.load(learned.results / "checkpoints" / "task_02.ckpt", weights_only=True)
    assert kept["state_dict"]
    # After all tasks every class competes in the last row, before the first only those of a column.
    assert second.get(0, 2) == first.get(3, 2)


def test_the_summary_names_versions_seed_and_no_errors(learned):
    summary = json.loads((learned.results / "summary.json").read_text())
    assert summary["errors"] == []
    assert "torch" in json.dumps(summary)
