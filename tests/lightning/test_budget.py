"""Budgets: a task ends with the last step within them, a run with the last task, both resumed."""

import json
import shutil

import pytest

from mmcl.evaluation.cost import Ledger, TaskCost
from mmcl.lightning.stages.budget import (
    BudgetSpent,
    ComputeBudget,
    RunBudget,
    TaskLimit,
    budget_line,
)
from tests.behaviour.kill_runs import in_process, snapshots_of
from tests.lightning.small_runs import SmallRuns

LEDGER = Ledger([
    TaskCost("a", seconds=3.0, samples_new=40, samples_replayed=10, flops=500.0, state_bytes=7),
    TaskCost("b", seconds=1.0, samples_new=20, samples_replayed=30, flops=None, state_bytes=9),
])  # fmt: skip


def test_what_is_left_counts_replayed_samples_too():
    budget = ComputeBudget(train_samples=130, train_flops=600.0, seconds=9.0)
    assert budget.minus(LEDGER) == ComputeBudget(train_samples=30, train_flops=100.0, seconds=5.0)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"train_samples": 100}, "budget.stream.train_samples .100 of 100."),
        ({"train_flops": 400.0}, "budget.stream.train_flops .500 of 400."),
        ({"seconds": 4.0}, "budget.stream.seconds .4 of 4."),
    ],
)
def test_a_budget_of_which_nothing_is_left_is_named(limits, words):
    with pytest.raises(BudgetSpent, match=words) as error:
        ComputeBudget(**limits).minus(LEDGER)
    assert error.value.exit_status == 4


@pytest.mark.parametrize(
    ("budget", "flops", "steps"),
    [
        (RunBudget(ComputeBudget(train_samples=39)), 0.0, 4),  # 8 samples a step
        (RunBudget(ComputeBudget(train_samples=40)), 0.0, 5),
        (RunBudget(ComputeBudget(train_samples=90), ComputeBudget(train_samples=117)), 0.0, 2),
        (RunBudget(ComputeBudget(train_flops=100.0)), 0.0, 6),  # not known yet
        (RunBudget(ComputeBudget(train_flops=100.0)), 5.0, 2),
        (RunBudget(ComputeBudget(train_samples=9999)), 0.0, 6),
    ],
)
def test_a_task_ends_with_the_last_step_within_the_smaller_limit(budget, flops, steps):
    limit = TaskLimit(budget, LEDGER)
    assert limit.limit_steps(6, lambda step: 8 * step, flops) == steps
    assert bool(limit.ended_by) == (steps < 6)


def test_less_than_a_step_is_refused():
    limit = TaskLimit(RunBudget(ComputeBudget(train_samples=7)), Ledger())
    with pytest.raises(BudgetSpent, match=r"train_samples 7 \(a step takes 8\)"):
        limit.limit_steps(6, lambda step: 8 * step, 0.0)


@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_of_nothing_is_refused(value):
    with pytest.raises(ValueError, match=f"seconds {value}: give more than 0"):
        ComputeBudget(seconds=value)


def test_bytes_that_a_strategy_keeps_are_compared():
    budget = RunBudget(buffer_bytes=8)
    budget.expect_bytes("a", 8)
    with pytest.raises(BudgetSpent, match="9 bytes of the strategy's state after task 'b', of 8"):
        budget.expect_bytes("b", 9)


def test_the_line_states_what_is_used():
    budget = RunBudget(stream=ComputeBudget(train_samples=200), buffer_bytes=10)
    assert budget_line(budget, LEDGER) == "budget: 100 of 200 samples, 9 of 10 bytes kept"
    assert budget_line(RunBudget(ComputeBudget(train_samples=1)), LEDGER) == ""


@pytest.mark.slow
def test_a_run_within_a_budget_resumes_from_what_is_on_disk_at_every_write(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    limits = {"budget__task__train_samples": 33}
    words = runs.words("alone", "ExperienceReplay", **limits)
    assert in_process(snapshots_of, words, runs.path("alone"), tmp_path / "left") == 0
    costs = json.loads((runs.path("alone") / "ledger.json").read_text())["tasks"]
    # Epochs of 6, 7 and 7 samples; then batches with replayed ones.
    assert costs[0]["steps"] == 5
    assert costs[0]["samples_new"] == 33
    assert all(cost["samples_new"] + cost["samples_replayed"] <= 33 for cost in costs)
    for folder in sorted((tmp_path / "left").iterdir())[::3]:
        shutil.rmtree(runs.path("killed"), ignore_errors=True)
        shutil.copytree(folder, runs.path("killed"))
        runs.finish("killed", "ExperienceReplay", **limits)
        assert runs.differences("killed", "alone") == [], folder.name


@pytest.mark.slow
def test_a_spent_budget_ends_a_run_and_a_larger_one_lets_it_go_further(tmp_path):
    runs = SmallRuns(tmp_path)
    runs.finish("free")
    status, output = runs.start("run", budget__stream__train_samples=74)
    assert status == 4
    assert "the budget is spent: budget.stream.train_samples (74 of 74)" in output
    # Two tasks of 20 and 17 samples in two epochs are whole.
    assert json.loads((runs.path("run") / "run.json").read_text())["finished_tasks"] == 2
    output = runs.finish("run", budget__stream__train_samples=200)
    assert runs.differences("run", "free") == []
    assert "budget: 106 of 200 samples" in output
    notes = json.loads((runs.path("run") / "summary.json").read_text())["warnings"]
    assert any("budget.stream.train_samples was changed from 74 to 200" in note for note in notes)


@pytest.mark.slow
def test_operations_and_seconds_end_a_task_too(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    runs.finish("free")
    costs = json.loads((runs.path("free") / "ledger.json").read_text())["tasks"]
    flops = costs[0]["flops"] * 0.5
    output = runs.finish("flops", budget__task__train_flops=flops)
    assert "was ended by budget.task.train_flops" in output
    found = json.loads((runs.path("flops") / "ledger.json").read_text())["tasks"]
    assert all(0 < cost["flops"] <= flops for cost in found)
    output = runs.finish("seconds", budget__task__seconds=1e-6)
    assert "was ended by budget.task.seconds 1e-06 after 1 of 6 steps" in output


@pytest.mark.slow
def test_an_annealed_branch_and_a_budget_are_refused_together(tmp_path):
    runs = SmallRuns(tmp_path)
    status, output = runs.start(
        "run", model__lr_schedule="infinite", model__warmup_steps=0, model__cooldown_steps=0,
        budget__task__train_samples=100,
    )  # fmt: skip
    assert status == 1
    assert "and a budget may end it before" in output
