"""A broken gate stops a run; it is accepted, or rolled back and trained again, to the bit."""

import json
import shutil

import pytest
import yaml

from mmcl.cli import main
from mmcl.core import TaskStream
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.stages import acceptance
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow
IMPOSSIBLE = {"gates": json.dumps([{"task": "first", "min": 101}])}


@pytest.fixture
def runs(tmp_path):
    made = SmallRuns(tmp_path)
    names = [task["name"] for task in yaml.safe_load(made.card.read_text())["tasks"]]
    made.card.write_text(made.card.read_text().replace(names[0], "first"))
    return made


def state(runs, name):
    return json.loads((runs.path(name) / "run.json").read_text())


def test_gates_that_are_kept_change_nothing(runs):
    runs.finish("free")
    output = runs.finish("kept", gates=json.dumps([{"task": "first", "min": 0}]))
    assert "gates after 'first': 1 kept" in output
    assert runs.differences("kept", "free") == []


def test_a_broken_gate_stops_until_each_task_is_accepted(runs):
    runs.finish("free")
    for tasks in (1, 2, 3):
        for _ in range(2):  # the same command, the same answer
            status, output = runs.start("run", **IMPOSSIBLE)
            assert status == 3
            assert "is not accepted (first: " in output
            assert state(runs, "run")["finished_tasks"] == tasks
        assert main(["gate", str(runs.path("run"))]) == 3
        assert main(["accept", str(runs.path("run"))]) == 0
    runs.finish("run", **IMPOSSIBLE)
    assert runs.differences("run", "free") == []
    notes = json.loads((runs.path("run") / "summary.json").read_text())["warnings"]
    assert "task 1 was accepted by hand, whatever its gates say" in notes


def test_gates_may_change_when_a_run_resumes(runs):
    assert runs.start("run", **IMPOSSIBLE)[0] == 3
    runs.finish("run", gates="[]")
    assert main(["gate", str(runs.path("run"))]) != 0  # has none now


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "Chain"])
def test_tasks_after_a_rollback_are_trained_to_the_same_bits(runs, strategy, capsys):
    runs.finish("free", strategy)
    runs.finish("run", strategy)
    assert main(["rollback", str(runs.path("run")), "--to", "first"]) == 0
    assert "rolled back to 1 trained tasks" in capsys.readouterr().out
    assert state(runs, "run")["finished_tasks"] == 1
    assert not (runs.path("run") / "checkpoints" / "task_01.ckpt").exists()
    assert (runs.path("run") / "rolled_back" / "01" / "checkpoints" / "task_01.ckpt").exists()
    runs.finish("run", strategy)
    assert runs.differences("run", "free") == []


def test_other_settings_are_taken_after_a_rollback_and_noted(runs):
    runs.finish("run")
    status, output = runs.start("run", model__learning_rate=0.5)
    assert status != 0
    assert "another configuration" in output
    assert main(["rollback", str(runs.path("run")), "--to", "1"]) == 0
    runs.finish("run", model__learning_rate=0.5)
    notes = json.loads((runs.path("run") / "summary.json").read_text())["warnings"]
    assert any("model.learning_rate was changed from 0.003 to 0.5" in note for note in notes)
    # The permission was for one start.
    assert runs.start("run", model__learning_rate=0.25)[0] != 0


def test_a_rollback_that_was_killed_is_finished_by_another(runs, monkeypatch):
    runs.finish("free")
    runs.finish("whole")

    class Killed(Exception):
        pass

    writes = ["matrix", "state", "ledger", "move"]
    for broken in writes:
        shutil.rmtree(runs.path("run"), ignore_errors=True)
        shutil.copytree(runs.path("whole"), runs.path("run"))
        with monkeypatch.context() as patched:

            def die(*arguments):
                raise Killed

            owner, name = {
                "matrix": (acceptance.AccuracyMatrix, "write"), "state": (RunDirectory, "save"),
                "ledger": (acceptance.Ledger, "write"), "move": (acceptance.os, "replace"),
            }[broken]  # fmt: skip
            patched.setattr(owner, name, die)
            folder, stream = RunDirectory(runs.path("run")), TaskStream.read(runs.card)
            with pytest.raises(Killed):
                acceptance.roll_back(folder, stream, folder.state(), 1)
        assert main(["rollback", str(runs.path("run")), "--to", "1"]) == 0
        runs.finish("run")
        assert runs.differences("run", "free") == [], broken


def test_a_dry_rollback_moves_nothing(runs, capsys):
    runs.finish("run")
    before = sorted(runs.path("run").rglob("*"))
    assert main(["rollback", str(runs.path("run")), "--to", "2", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "task_02.ckpt" in output
    assert "task_01.ckpt" not in output
    assert sorted(runs.path("run").rglob("*")) == before


def test_a_rollback_to_a_task_that_is_not_finished_is_refused(runs, capsys):
    runs.finish("run")
    for wrong, sentence in (("4", "give 0 to 3"), ("nothing", "there is no task 'nothing'")):
        assert main(["rollback", str(runs.path("run")), "--to", wrong]) == 1
        assert sentence in capsys.readouterr().err
