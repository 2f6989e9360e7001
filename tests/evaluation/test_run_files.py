import json
from dataclasses import asdict

import pytest

from mmcl.evaluation import MetricValue, RunSummary, predictions_path, strict_json

SUMMARY = RunSummary(
    name="digits_er-0",
    stream="digits",
    scenario="class",
    strategy="ExperienceReplay",
    model="OpenCLIP tiny",
    seed=0,
    metrics=(
        MetricValue("forgetting", 0.25, "..."),
        MetricValue("forward transfer", None, "...", "why"),
    ),
    versions={"torch": "2.15"},
    hashes={"card": "ab"},
    errors=("000.jpg is broken", {"shard": "a.tar", "key": "1", "reason": "no label"}),
    warnings=("EWC had no gradient over task 2",),
    seconds=12.5,
    finished=True,
)


def test_a_summary_comes_back_as_it_was(tmp_path):
    SUMMARY.write(tmp_path / "summary.json")
    assert RunSummary.read(tmp_path / "summary.json") == SUMMARY


def test_the_file_has_the_agreed_keys(tmp_path):
    SUMMARY.write(tmp_path / "summary.json")
    raw = json.loads((tmp_path / "summary.json").read_text())
    assert list(raw) == [
        "name", "stream", "scenario", "strategy", "model", "seed", "metrics", "versions",
        "hashes", "errors", "warnings", "seconds", "finished",
    ]  # fmt: skip
    assert raw["metrics"][0] == {
        "name": "forgetting", "value": 0.25, "definition": "...", "reason": None
    }  # fmt: skip


def test_a_figure_is_found_by_name():
    assert SUMMARY.metric("forgetting").value == 0.25
    assert SUMMARY.metric("nothing") is None


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": "open"},
        {"seed": "0"},
        {"finished": 1},
        {"seconds": -1},
        {"versions": {"torch": 2}},
        {"metrics": [{"name": "x", "value": None, "definition": "", "reason": None}]},
        {"metrics": [{"name": "x", "value": 1.0, "definition": "", "reason": "why"}]},
        {"errors": [1]},
        {"warnings": "none"},
        {"name": None},
    ],
)
def test_a_wrong_part_is_named(change):
    raw = asdict(SUMMARY) | change
    with pytest.raises(ValueError, match=f"{next(iter(change))}'?(\\[.*\\])?:? .*(is|has) "):
        strict_json.load(RunSummary, raw, "summary.json")


def test_a_missing_and_an_unknown_key_are_both_named():
    raw = asdict(SUMMARY) | {"colour": 1}
    del raw["seed"]
    with pytest.raises(ValueError, match=r"'seed' is missing; unknown keys \['colour'\]"):
        strict_json.load(RunSummary, raw, "summary.json")


def test_a_summary_that_could_not_be_read_is_not_written(tmp_path):
    bad = RunSummary("n", "s", "class", "x", "m", 0, seconds=float("nan"))
    with pytest.raises(ValueError, match="'seconds' is nan"):
        bad.write(tmp_path / "summary.json")
    assert list(tmp_path.iterdir()) == []


def test_the_path_of_predictions_names_row_and_column(tmp_path):
    assert predictions_path(tmp_path, 3, 12) == tmp_path / "answers" / "row_03" / "col_12.jsonl"
