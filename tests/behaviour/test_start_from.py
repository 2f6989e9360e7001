"""A run that starts from the weights of another: equal, resumed to the bit, with its lineage."""

import json
import shutil

import pytest
import torch
import yaml

from mmcl.cli import main
from mmcl.lightning.stages.lineage import Lineage
from tests.behaviour.kill_runs import KILLED
from tests.lightning.small_runs import SmallRuns

pytestmark = pytest.mark.slow


def scores(runs, name, row):
    return runs.matrix(name).values[row]


@pytest.fixture
def runs(tmp_path):
    made = SmallRuns(tmp_path)
    made.finish("supplier")
    return made


def test_the_start_is_the_other_runs_state(runs):
    runs.finish("consumer", "ExperienceReplay", start_from=f"{runs.path('supplier')}@2")
    start = torch.load(runs.path("consumer") / "start.ckpt", weights_only=True)
    supplier = runs.kept("supplier", 1)
    assert all(
        torch.equal(start[n], supplier[f"model.{n}"]) for n in start if f"model.{n}" in supplier
    )
    # Class names seen by a row differ, so a column is compared whose task both know.
    answers = [
        (runs.path(name) / "answers" / f"row_{row:02d}" / "col_01.jsonl").read_text().splitlines()
        for name, row in (("supplier", 2), ("consumer", 0))
    ]
    assert [json.loads(a)["text"] for a in answers[0]] == [
        json.loads(a)["text"] for a in answers[1]
    ]


def test_a_run_from_another_resumes_to_the_bit_without_that_other(runs):
    start = f"{runs.path('supplier')}@1"
    runs.finish("alone", "EWC", start_from=start)
    status, _ = runs.start("killed", "EWC", kill=("step", 7), start_from=start)
    assert status == KILLED
    shutil.rmtree(runs.path("supplier"))
    runs.finish("killed", "EWC", start_from=start)
    assert runs.differences("killed", "alone") == []


def test_a_start_that_was_lost_is_named(runs):
    start = f"{runs.path('supplier')}@1"
    runs.finish("run", start_from=start)
    (runs.path("run") / "start.ckpt").unlink()
    status, output = runs.start("run", start_from=start)
    assert status == 1
    assert "start.ckpt is missing, from whose weights this run started: restore it" in output
    status, output = runs.start("run", start_from=f"{runs.path('supplier')}@2")
    assert status == 1
    assert "start_from" in output


def test_a_model_of_another_shape_is_refused_by_its_first_weight(runs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    wider = SmallRuns(other, patch_size=4)
    status, output = wider.start("run", start_from=f"{runs.path('supplier')}@1")
    assert status == 1
    assert "the other run's model has clip.visual" in output
    assert "in another shape" in output


def test_what_is_more_than_weights_cannot_be_a_start(runs):
    runs.finish("prompts", "L2P")
    status, output = runs.start("run", start_from=f"{runs.path('prompts')}@1")
    assert status == 1
    assert "L2P predicts with more than weights" in output


def test_adapters_are_folded_into_the_start(tmp_path, capsys):
    runs = SmallRuns(tmp_path, kind="instruction", sizes=(20, 17))
    runs.finish("supplier", "LoRA")
    runs.finish("consumer", "LoRA", start_from=f"{runs.path('supplier')}@2")
    assert scores(runs, "consumer", 0) == pytest.approx(scores(runs, "supplier", 2))
    target = tmp_path / "adapter"
    assert main(["export", str(runs.path("consumer")), str(target), "--as", "peft"]) == 1
    assert "was trained on the weights of another run" in capsys.readouterr().err
    assert main(["export", str(runs.path("consumer")), str(target)]) == 0
    assert (target / "lineage.json").is_file()


def test_lineage_names_every_checkpoint_by_its_hash(runs, tmp_path, capsys):
    runs.finish("consumer", start_from=f"{runs.path('supplier')}@2")
    found = Lineage.read(runs.path("consumer") / "lineage.json")
    assert [link.checkpoint for link in found.tasks] == [f"task_{n:02d}.ckpt" for n in range(3)]
    assert found.start is not None
    assert (found.start.tasks, found.start.run) == (2, str(runs.path("supplier").resolve()))
    supplier = Lineage.read(runs.path("supplier") / "lineage.json")
    assert found.base_sha256 != supplier.base_sha256
    assert main(["lineage", str(runs.path("consumer"))]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "after 2 tasks" in output
    assert output.count("task_01.ckpt") == 2
    assert output.count("task_02.ckpt") == 1  # of the consumer alone
    (runs.path("supplier") / "checkpoints" / "task_01.ckpt").write_bytes(b"other")
    shutil.rmtree(runs.path("consumer") / "checkpoints")
    assert main(["lineage", str(runs.path("consumer")), "--verify"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "which is another file now" in output
    assert "which is gone" in output


def test_lineage_follows_a_rollback(runs):
    before = Lineage.read(runs.path("supplier") / "lineage.json")
    assert main(["rollback", str(runs.path("supplier")), "--to", "1"]) == 0
    runs.finish("supplier", model__learning_rate=0.1)
    after = Lineage.read(runs.path("supplier") / "lineage.json")
    same = [one == other for one, other in zip(before.tasks, after.tasks, strict=True)]
    assert same == [True, False, False]


def test_an_export_has_the_lineage_of_its_state(runs, tmp_path, capsys):
    file = tmp_path / "out.safetensors"
    words = ["export", str(runs.path("supplier")), str(file), "--after_task", "1"]
    assert main(words) == 0
    found = Lineage.read(tmp_path / "out.safetensors.lineage.json")
    assert len(found.tasks) == 1
    assert found.weights_sha256 in capsys.readouterr().out
    assert main(["lineage", str(file)]) == 0
    assert yaml.safe_load(json.dumps(found.run)) == str(runs.path("supplier").resolve())
