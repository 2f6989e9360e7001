"""``mmcl merge`` on runs: facts of the inputs, and options refused by name."""

import json
import shutil
from argparse import ArgumentTypeError

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmcl.cli.merge_sweep import number_or_range
from mmcl.data.remote.location import sha256_of
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.diagnostic_record import Diagnostic


def test_checkpoints_of_a_run_become_one_model(answered):
    run = next((answered.folder / "runs").iterdir())
    status, out, err = answered.give(
        "merge", f"{run}@1", f"{run}@2", "merged", "--method", "ema", "--decay", "0.25"
    )
    assert (status, err) == (0, "")
    assert "merged: a transformers model" in out
    facts = json.loads((answered.folder / "merged" / "merge.json").read_text())
    assert facts["arguments"] == {"share": 0.75}
    assert [each["sha256"] for each in facts["inputs"]] == [
        sha256_of(run / "checkpoints" / f"task_0{index}.ckpt") for index in (0, 1)
    ]
    for tasks in ("1", "2"):
        given = ("export", str(run), f"after{tasks}", "--as", "transformers", "--after_task", tasks)
        assert answered.give(*given)[0] == 0
    first, second, merged = (
        AutoModelForImageTextToText.from_pretrained(answered.folder / name).state_dict()
        for name in ("after1", "after2", "merged")
    )
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--method", "average", "--density", "0.2"], "--density is not used by --method average"),
        (["--method", "wise", "--base", "x"], "--base is not used by --method wise"),
        (["--method", "average", "--weights", "a,b"], "--weights is 'a,b': give numbers"),
        (["--method", "soup"], "invalid choice: 'soup'"),
    ],
)
def test_an_option_that_is_not_used_is_refused(desk, words, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", *words)
    assert status == 2
    assert wanted in err


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("-0.2:0.2:0.2", [-0.2, 0, 0.2]),
        (".5:.5:1", [0.5]),
    ],
)
def test_a_range_has_both_ends_and_exact_decimals(text, values):
    assert list(number_or_range(text).values) == values


def test_a_range_has_at_most_101_values():
    assert len(number_or_range("0:1:0.01").values) == 101
    with pytest.raises(ArgumentTypeError, match="has 102 values"):
        number_or_range("0:1.01:0.01")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("half", "'half' is no number and no range"),
        ("0:1", "the range '0:1' is malformed"),
        ("0:1:0.1:2", "malformed"),
        ("0:one:0.1", "malformed"),
        ("0:inf:1", "malformed"),
        ("1:0:0.1", "is empty: give a stop"),
        ("0:1:0", "the step of the range '0:1:0' is 0"),
        ("0:1:-0.1", "is -0.1: give more than 0"),
        ("0:1:0.3", "does not reach its stop 1"),
    ],
)
def test_a_range_that_is_none_is_refused(desk, text, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", "--method", "wise", f"--alpha={text}")
    assert status == 2
    assert wanted in err


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--method", "wise", "--old", "a"], "--old is used by a sweep"),
        (["--method", "wise", "--alpha", "0.5", "--data", "x"], "--data is used by a sweep"),
        (["--method", "wise", "--alpha", "0:2:1"], "--alpha has 2: give 0 to 1"),
        (["--method", "ema", "--decay", "0:1:0.1"], "invalid float value: '0:1:0.1'"),
        (["--method", "wise", "--scale", "0:1:0.1"], "--scale is not used by --method wise"),
    ],
)
def test_options_of_a_sweep_are_refused_elsewhere(desk, words, wanted):
    status, _, err = desk.give("merge", "a", "b", "out", *words)
    assert status == 2
    assert wanted in err


@pytest.mark.slow
def test_a_sweep_scores_the_line_as_connect_does_and_exports_the_best(learned):
    words = ("--method", "wise", "--alpha", "0:1:0.5")
    status, out, err = learned.give("merge", "small_run@2", "small_run", "swept", *words)
    assert status == 0, err
    folder = learned.folder / "swept"
    found = json.loads((folder / "sweep.json").read_text())
    assert (found["old"], found["new"]) == (["task-a", "task-b"], ["task-c"])
    assert [point["value"] for point in found["points"]] == [
        0, 0.5, 1,
    ]  # fmt: skip
    assert learned.give("connect", "small_run@2", "small_run", "--points", 3)[0] == 0
    file = learned.results / "diagnostics" / "connect_small_run@2_small_run@3.json"
    panel = next(panel for panel in Diagnostic.read(file).panels if panel.is_score)
    line = {series.name: series.values for series in panel.series}
    for index, point in enumerate(found["points"]):
        for task in ("task-a", "task-b", "task-c"):
            assert point["scores"][task] == line[task][index]
        old = (line["task-a"][index] + line["task-b"][index]) / 2
        assert point["old"] == pytest.approx(old)
        assert point["mean"] == pytest.approx((old + line["task-c"][index]) / 2)
    means = [point["mean"] for point in found["points"]]
    best = found["points"][means.index(max(means))]["value"]
    assert found["best"] == best
    assert json.loads((folder / "model" / "merge.json").read_text())["arguments"] == {"alpha": best}
    assert (folder / "sweep.md").read_text().strip() in out
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    plain = ("--method", "wise", "--alpha", str(best))
    assert learned.give("merge", "small_run@2", "small_run", "plain", *plain)[0] == 0
    one, two = (
        load_file(learned.folder / name / "open_clip_model.safetensors")
        for name in ("swept/model", "plain")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_a_sweep_of_task_vectors_scores_named_tasks_of_another_card(learned):
    card = learned.folder / "other" / "small.yaml"
    shutil.copytree(learned.card.parent, card.parent)
    card.write_text(card.read_text().replace("task-", "other-"))
    words = ("small_run@1", "small_run", "out", "--method", "ties", "--scale", "0:1:1")
    status, _, err = learned.give("merge", *words, "--data", card)
    assert status == 2
    assert "no old tasks to score" in err
    assert "give --old and --new, any of other-a, other-b, other-c" in err
    groups = ("--old", "other-c", "--new", "other-a,other-b")
    status, _, err = learned.give("merge", *words, "--data", card, *groups, "--samples", "3")
    assert status == 0, err
    found = json.loads((learned.folder / "out" / "sweep.json").read_text())
    assert (found["old"], found["new"]) == (["other-c"], ["other-a", "other-b"])
    for groups, wanted in (
        (("--old", "task-a", "--new", "task-a"), "'task-a' is old and new"),
        (("--old", "x", "--new", "task-a"), "--old has 'x', which is no task"),
    ):
        status, _, err = learned.give("merge", *words[:2], "again", *words[3:], *groups)
        assert status == 2
        assert wanted in err
    status, _, err = learned.give("merge", "small_run", "small_run@2", "again", *words[3:])
    assert "no new tasks to score" in err


@pytest.mark.slow
def test_a_model_that_answers_is_swept_over_its_adapters_products(answered):
    run = next((answered.folder / "runs").iterdir())
    words = ("--method", "wise", "--alpha", "0:1:1")
    status, _, err = answered.give("merge", f"{run}@1", f"{run}@2", "swept", *words)
    assert status == 0, err
    found = json.loads((answered.folder / "swept" / "sweep.json").read_text())
    matrix = AccuracyMatrix.read(run / "matrix.json")
    assert len(found["points"][1]["scores"]) == 2
    for number, score in enumerate(found["points"][1]["scores"].values()):
        assert score == pytest.approx(matrix.get(2, number))
