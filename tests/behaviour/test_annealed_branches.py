"""Annealed branches: released and evaluated, while training goes from before them, to the bit."""

import json
import shutil

import pytest
import torch
import yaml

from tests.behaviour.kill_runs import in_process, snapshots_of
from tests.lightning.small_runs import SmallRuns, same

pytestmark = pytest.mark.slow
INFINITE = {
    "model__lr_schedule": "infinite", "model__warmup_steps": 0, "model__cooldown_steps": 0,
    "model__constant_lr_ratio": 0.5, "model__anneal_steps": 3,
}  # fmt: skip
PLAIN = {
    "model__lr_schedule": "constant", "model__warmup_steps": 0, "model__learning_rate": 1.5e-3,
}  # fmt: skip


def constant(runs, name, task):
    file = runs.path(name) / "checkpoints" / f"constant_{task:02d}.ckpt"
    return torch.load(file, weights_only=True)["state_dict"]


@pytest.mark.parametrize("strategy", ["Finetune", "Chain", "DarkReplay"])
def test_the_constant_branch_is_a_run_without_branches_bit_for_bit(tmp_path, strategy):
    runs = SmallRuns(tmp_path)
    runs.finish("plain", strategy, **PLAIN)
    runs.finish("branched", strategy, **INFINITE)
    for task in range(3):
        plain, kept = runs.kept("plain", task), constant(runs, "branched", task)
        assert [key for key in plain if not same(plain[key], kept[key])] == []
        branch = runs.kept("branched", task)
        moved = [
            k for k, v in branch.items() if isinstance(v, torch.Tensor) and not same(v, kept[k])
        ]
        assert moved, "the branch did not train"
    assert runs.matrix("branched").values != runs.matrix("plain").values
    steps = [
        cost["steps"]
        for cost in json.loads((runs.path("branched") / "ledger.json").read_text())["tasks"]
    ]
    plain = [
        cost["steps"]
        for cost in json.loads((runs.path("plain") / "ledger.json").read_text())["tasks"]
    ]
    assert steps == [count + 3 for count in plain]


@pytest.mark.parametrize("strategy", ["DarkReplay", "EWC"])
def test_a_run_with_branches_resumes_from_what_is_on_disk_at_every_write(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(12, 10))
    words = runs.words("alone", strategy, **INFINITE)
    assert in_process(snapshots_of, words, runs.path("alone"), tmp_path / "left") == 0
    left = sorted((tmp_path / "left").iterdir())
    assert len(left) > 20
    for folder in left:
        shutil.rmtree(runs.path("killed"), ignore_errors=True)
        shutil.copytree(folder, runs.path("killed"))
        runs.finish("killed", strategy, **INFINITE)
        assert runs.differences("killed", "alone") == [], folder.name
        for task in range(2):
            alone, killed = constant(runs, "alone", task), constant(runs, "killed", task)
            assert [key for key in alone if not same(alone[key], killed[key])] == [], folder.name


def test_an_appended_task_is_trained_from_before_the_last_branch(tmp_path):
    runs = SmallRuns(tmp_path)
    runs.finish("whole", **INFINITE)
    card = yaml.safe_load(runs.card.read_text())
    runs.card.write_text(yaml.safe_dump({**card, "tasks": card["tasks"][:2]}))
    runs.finish("grown", **INFINITE)
    runs.card.write_text(yaml.safe_dump(card))
    runs.finish("grown", **INFINITE)
    assert [k for k, v in runs.kept("whole").items() if not same(v, runs.kept("grown")[k])] == []


def test_a_lost_constant_checkpoint_trains_its_task_again(tmp_path):
    runs = SmallRuns(tmp_path)
    runs.finish("alone", **INFINITE)
    card = yaml.safe_load(runs.card.read_text())
    runs.card.write_text(yaml.safe_dump({**card, "tasks": card["tasks"][:2]}))
    runs.finish("lost", **INFINITE)
    (runs.path("lost") / "checkpoints" / "constant_01.ckpt").unlink()
    runs.card.write_text(yaml.safe_dump(card))
    output = runs.finish("lost", **INFINITE)
    assert "constant_01.ckpt is missing: trained again from the beginning: " in output
    assert runs.differences("lost", "alone") == []


def test_a_task_that_may_end_early_has_no_annealed_branch(tmp_path):
    runs = SmallRuns(tmp_path)
    status, output = runs.start("best", **INFINITE, keep_best="loss", data__validation_share=0.2)
    assert status == 1
    assert "and keep_best chooses another: leave it out, or use lr_schedule rewarm" in output


def test_a_branch_of_what_has_no_steps_is_none(tmp_path):
    runs = SmallRuns(tmp_path)
    runs.finish("closed", "RanPAC", **INFINITE)
    assert sorted(p.name for p in (runs.path("closed") / "checkpoints").iterdir()) == [
        "task_00.ckpt", "task_01.ckpt", "task_02.ckpt",
    ]  # fmt: skip
