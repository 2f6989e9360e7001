"""A card that grows: the same command learns the new task and nothing else."""

import json
import re

import pytest
import yaml

from tests.behaviour.kill_runs import KILLED, command, in_process
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow


def tasks_on_card(runs, change):
    """Change the list of tasks on the card."""
    card = yaml.safe_load(runs.card.read_text())
    card["tasks"] = change(card["tasks"])
    runs.card.write_text(yaml.safe_dump(card))


def learned_steps(runs, name):
    """The optimizer steps of every task, as the ledger counts them."""
    ledger = json.loads((runs.path(name) / "ledger.json").read_text())
    return {task["task"]: task["steps"] for task in ledger["tasks"]}


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "EWC", "RanPAC", "L2P", "DarkReplay"])
def test_a_run_that_grew_equals_one_that_had_all_tasks_from_the_start(runs, strategy):
    runs.finish("whole", strategy)
    full = yaml.safe_load(runs.card.read_text())["tasks"]
    tasks_on_card(runs, lambda tasks: tasks[:2])
    runs.finish("grown", strategy)
    kept = sorted((runs.path("grown") / "checkpoints").glob("task_*.ckpt"))
    before = [(file, file.stat().st_mtime_ns) for file in kept]
    tasks_on_card(runs, lambda tasks: full)
    output = runs.finish("grown", strategy)
    assert "resuming after task 1 ('task-b')" in output
    assert [(file, file.stat().st_mtime_ns) for file in kept] == before
    assert runs.differences("grown", "whole") == []
    assert learned_steps(runs, "grown") == learned_steps(runs, "whole")


def test_the_earlier_rows_of_a_new_column_are_scored_also_after_a_kill(runs):
    full = yaml.safe_load(runs.card.read_text())["tasks"]
    runs.finish("whole")
    tasks_on_card(runs, lambda tasks: tasks[:1])
    runs.finish("grown")
    assert runs.matrix("grown").names == ("task-a",)
    tasks_on_card(runs, lambda tasks: full)
    for moment in (("score", 2), ("step", 5), ("ended", 1)):
        assert runs.start("grown", kill=moment)[0] == KILLED
    runs.finish("grown")
    assert runs.matrix("grown").missing() == []
    assert runs.differences("grown", "whole") == []


def test_an_eval_only_task_that_is_added_is_scored_in_every_row_and_trains_nothing(runs):
    runs.finish("run")
    before = runs.matrix("run")
    steps = learned_steps(runs, "run")
    card = yaml.safe_load(runs.card.read_text())
    card["eval_only"] = [{"name": "seen-aside", "classes": ["c0", "c3"], "test": "a-test.tar"}]
    card["eval_only"][0]["classes"] = ["c0", "c1"]
    runs.card.write_text(yaml.safe_dump(card))
    assert "all 3 tasks are finished" in runs.finish("run")
    after = runs.matrix("run")
    assert after.names == (*before.names, "seen-aside")
    assert all(after.get(row, 3) is not None for row in range(4))
    assert [row[:3] for row in after.values] == [tuple(row) for row in before.values]
    assert learned_steps(runs, "run") == steps


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tasks: tasks[:2], r"task 2 \('task-c'\), which this run was trained on, is not"),
        (lambda tasks: tasks[1:], r"task 0 \('task-a'\), which this run was trained on, is not"),
        (lambda tasks: [tasks[1], tasks[0], tasks[2]], r"task 0 \('task-a'\) is not the one"),
        (
            lambda tasks: [tasks[0], {**tasks[1], "templates": ["a {}"]}, tasks[2]],
            r"task 1 \('task-b'\) is not the one",
        ),
        (
            lambda tasks: [tasks[0], tasks[1], {**tasks[2], "train": "b-test.tar"}],
            r"the data of task 'task-c' \(train\) is not what this run was trained on: shard b-",
        ),
    ],
    ids=["last removed", "first removed", "order", "templates", "data"],
)
def test_a_learned_task_that_was_removed_or_changed_is_refused_by_name(finished, change, sentence):
    card = finished.card.read_text()
    tasks_on_card(finished, change)
    status, output = finished.start("run", "ExperienceReplay")
    finished.card.write_text(card)
    assert status == 1
    assert re.search(sentence, output)
    assert "--run_name" in output


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    runs = SmallRuns(tmp_path_factory.mktemp("finished"))
    runs.finish("run", "ExperienceReplay")
    return runs


def test_evaluate_of_a_task_checkpoint_repeats_the_result_of_the_run(finished):
    output = finished.folder / "evaluate.output"
    before = (finished.path("run") / "matrix.json").read_bytes()
    words = ["evaluate", str(finished.path("run")), "--after_task", "1-3", "--tasks", "0,2"]
    assert in_process(command, words, output) == 0, output.read_text()
    found = finished.matrix("run/evaluation")
    own = finished.matrix("run")
    for row in (1, 2, 3):
        for column in (0, 2):
            assert found.get(row, column) == own.get(row, column)
    assert found.get(0, 0) is None
    assert found.get(1, 1) is None
    assert (finished.path("run") / "matrix.json").read_bytes() == before


def test_every_row_of_the_matrix_comes_from_its_checkpoint(finished):
    assert in_process(command, ["evaluate", str(finished.path("run"))]) == 0
    assert finished.matrix("run/evaluation").values == finished.matrix("run").values
