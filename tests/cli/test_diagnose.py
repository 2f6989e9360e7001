"""Commands that diagnose checkpoints of runs."""

import json
import shutil

import pytest

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.diagnostic_record import Diagnostic

pytestmark = pytest.mark.slow


def record(desk, name):
    return Diagnostic.read(desk.results / "diagnostics" / f"{name}.json")


def test_connect_draws_the_line_between_two_states(learned):
    status, output, error = learned.give(
        "connect", "small_run@1", "small_run@task-c", "--points", 3, "--samples", 4
    )
    assert status == 0, error
    assert "onnected: the barrier of the mean loss" in output
    found = record(learned, "connect_small_run@1_small_run@task-c")
    assert found.x_values == (0.0, 0.5, 1.0)
    names = [series.name for series in found.panels[0].series]
    assert names == ["mean", "task-a", "task-b", "task-c"]
    for file in (f"diagnostics/{found.name}.csv", f"figures/{found.name}.png", "report.html"):
        assert (learned.results / file).stat().st_size > 100, file
    assert "<h2>Diagnostics</h2>" in (learned.results / "report.html").read_text()


def test_connect_measures_on_another_card_or_run(learned):
    card = learned.folder / "other" / "small.yaml"
    shutil.copytree(learned.card.parent, card.parent)
    card.write_text(card.read_text().replace("task-", "other-"))
    for data in (card, "small_run"):
        words = ("connect", "small_run@0", "small_run@1", "--data", data, "--points", 3)
        status, _, error = learned.give(*words, "--no_score", "--tasks", "0,2")
        assert status == 0, error
        found = record(learned, "connect_small_run@0_small_run@1")
        names = [series.name for series in found.panels[0].series]
        prefix = "other" if data == card else "task"
        assert names == ["mean", f"{prefix}-a", f"{prefix}-c"]
        assert len(found.panels) == 1


def test_similarity_compares_layers_and_heads(learned):
    status, output, error = learned.give("similarity", "small_run@0", "small_run", "--samples", 12)
    assert status == 0, error
    assert "CKA of the image embedding" in output
    found = record(learned, "similarity_small_run@0_small_run@3")
    assert [panel.title for panel in found.panels] == ["linear CKA", "cosine of attention maps"]
    heads = (learned.results / "diagnostics" / f"{found.name}_heads.csv").read_text()
    assert heads.splitlines()[0] == "tower,layer,head,cosine"
    assert len(heads.splitlines()) == 1 + 2 + 2  # two heads in the one layer of each tower


def test_diagnose_writes_what_there_is_and_says_what_not(learned):
    status, output, error = learned.give(
        "diagnose", "small_run", "--samples", 12, "--draws", 1, "--sigmas", "0.01"
    )
    assert status == 0, error
    assert "recovery is left out: the stream 'small' trains every task once" in output
    assert record(learned, "flatness").x_names == ("zero-shot", "task-a", "task-b", "task-c")
    probe = record(learned, "linear_probe")
    assert {metric.name for metric in probe.metrics} >= {
        "mean representation forgetting", "mean read-out forgetting",
    }  # fmt: skip
    assert sorted(p.name for p in (learned.results / "diagnostics").glob("*.json")) == [
        "flatness.json", "linear_probe.json",
    ]  # fmt: skip


def test_diagnose_finds_recovery_in_a_cyclic_run(desk):
    assert desk.run("--data.repeats", 2)[0] == 0
    status, output, error = desk.give("diagnose", "small_run", "--what", "recovery")
    assert status == 0, error
    assert "mean recovery index" in output
    found = record(desk, "recovery")
    assert len(found.x_values) == 7
    assert [series.name for series in found.panels[0].series] == ["task-a", "task-b", "task-c"]


def test_a_dry_run_counts_the_tasks_of_all_cycles(desk):
    status, output, error = desk.run("--data.repeats", 2, command=["check"])
    assert status == 0, error
    assert "6 tasks" in output
    assert "task-c (2)" in output


def test_evaluate_measures_a_repeated_task_as_the_last_one_trained(desk):
    assert desk.run("--data.repeats", 2)[0] == 0
    status, output, error = desk.give("evaluate", "small_run", "--after_task", 5, "--tasks", 3)
    assert status == 0, error
    found = AccuracyMatrix.read(desk.results / "evaluation" / "matrix.json")
    assert found.get(5, 3) == AccuracyMatrix.read(desk.results / "matrix.json").get(5, 0)


def test_a_lost_checkpoint_is_left_out_and_named(learned):
    (learned.results / "checkpoints" / "task_01.ckpt").unlink()
    status, output, error = learned.give(
        "diagnose", "small_run", "--what", "flatness", "--draws", 1, "--samples", 4
    )
    assert status == 0, error
    assert "task_01.ckpt is missing: this state is left out" in output
    assert record(learned, "flatness").panels[0].series[0].values[2] is None


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("diagnose", "small_run", "--what", "depth"), 2, "there is no 'depth': choose any of"),
        (("diagnose", "small_run", "--what", "recovery"), 1, "trains every task once"),
        (("diagnose", "small_run", "--sigmas", "a"), 2, "argument --sigmas: invalid"),
        (("diagnose", "small_run", "--samples", "0"), 1, "samples is 0"),
        (("diagnose", "nowhere"), 1, "there is no run nowhere"),
        (("connect", "small_run", "small_run@3"), 2, "are the same checkpoint"),
        (("connect", "small_run@1", "small_run@9"), 1, "is after 9 tasks"),
        (("connect", "small_run@1", "small_run@2", "--points", "2"), 1, "points is 2"),
        (("connect", "small_run@1", "small_run@2", "--tasks", "7"), 1, "--tasks has [7]"),
        (("similarity", "small_run@1", "small_run@2", "--data", "no.yaml"), 1, "no.yaml"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(learned, words, status, sentence):
    found, _, error = learned.give(*words)
    assert found == status
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


def test_answers_are_diagnosed_too(answered):
    words = ("connect", "small_run@1", "small_run@2", "--points", 3, "--tasks", 0)
    status, _, error = answered.give(*words)
    assert status == 0, error
    assert [p.title for p in record(answered, "connect_small_run@1_small_run@2").panels] == [
        "loss", "score",
    ]  # fmt: skip
    status, _, error = answered.give("similarity", "small_run@1", "small_run@2", "--samples", 12)
    assert status == 0, error
    json.loads(next(iter((answered.results / "diagnostics").glob("sim*.json"))).read_text())
