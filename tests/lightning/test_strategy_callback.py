"""An inactive part of a strategy is reported by its name after the task."""

import json

import pytest
import torch

from mmcl.core import Chain
from mmcl.lightning.strategy_callback import InactivePenaltyMonitor
from tests.behaviour.corrupt_files import EmptyStore, Healthy
from tests.behaviour.kill_runs import KILLED
from tests.lightning.small_runs import SmallRuns

SMALL_POOL = {"class_path": "mmcl.strategies.L2P", "init_args": {"pool_size": 2, "top_k": 2}}


def warnings_of(runs, name):
    return json.loads((runs.path(name) / "summary.json").read_text())["warnings"]


def planted(name):
    return {"class_path": f"tests.behaviour.corrupt_files.{name}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "sentence"),
    [
        (planted("DetachedPenalty"), "DetachedPenalty has an inactive part in task "
         "'task-a': penalty 'held' has no gradient"),
        (planted("ZeroPenalty"), "ZeroPenalty has an inactive part in task 'task-a': "
         "penalty 'pull' was 0 on every step"),
        (planted("EmptyStore"), "EmptyStore has an inactive part in task 'task-a': "
         "rows is empty"),
        ({"class_path": "mmcl.strategies.L2P",
          "init_args": {"pool_size": 40, "prompt_length": 1, "top_k": 1}},
         "L2P has an inactive part in task 'task-a': pool entries "),
    ],
    ids=["detached", "zero", "empty", "unchosen"],
)  # fmt: skip
def test_a_part_that_does_nothing_is_named_on_the_screen_and_in_the_summary(
    tmp_path, strategy, sentence
):
    runs = SmallRuns(tmp_path, sizes=(12, 10))
    output = runs.finish("run", strategy)
    assert f"warning: {sentence}" in output
    found = warnings_of(runs, "run")
    assert any(warning.startswith(sentence) for warning in found)
    assert any("'task-b'" in warning for warning in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [planted("Healthy"), "EWC", "ExperienceReplay", "LwF", "Chain", SMALL_POOL],
    ids=["healthy", "EWC", "ExperienceReplay", "LwF", "Chain", "L2P"],
)
def test_a_strategy_that_works_is_not_accused(runs, strategy):
    assert "warning:" not in runs.finish("run", strategy)
    assert warnings_of(runs, "run") == []


@pytest.mark.slow
def test_what_was_seen_before_a_kill_counts(tmp_path):
    # The penalty is alive in the third of six steps only, and the run dies after the fourth.
    runs = SmallRuns(tmp_path, sizes=(20, 16))
    strategy = planted("AliveOnce")
    assert runs.start("run", strategy, kill=("step", 5))[0] == KILLED
    runs.finish("run", strategy)
    assert warnings_of(runs, "run") == []


def test_a_penalty_is_judged_by_its_best_step_however_many_there_are():
    weight = torch.ones((), requires_grad=True)
    alarm = InactivePenaltyMonitor()
    for step in range(200):
        alarm.update({"task": weight, "rare": weight * (step == 150), "never": weight * 0})
    found = alarm.messages(Healthy(), "first")
    assert len(found) == 2  # and the store of Healthy is empty
    assert "penalty 'never' was 0 on every step" in found[0]


def test_a_member_of_a_chain_is_named():
    found = InactivePenaltyMonitor().messages(Chain([Healthy(), EmptyStore()]), "first")
    assert found[1].endswith("EmptyStore: rows is empty")
