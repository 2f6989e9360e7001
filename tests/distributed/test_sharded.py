"""Weights shared out over two processes (FSDP2): the same run as on one, killed or not."""

import json
from pathlib import Path

import pytest
import yaml

from tests.behaviour.kill_runs import KILLED
from tests.distributed.ranks import on_ranks, seen
from tests.distributed.test_two_processes import PLAIN, far
from tests.lightning.small_runs import SmallRuns, same

pytestmark = pytest.mark.slow
OVERLAY = Path(__file__).parents[2] / "configs" / "overlay" / "fsdp.yaml"
SHARDS = yaml.safe_load(OVERLAY.read_text())["trainer"]["strategy"]
WHOLE = {**SHARDS, "init_args": {**SHARDS["init_args"], "save_distributed_checkpoint": False}}
LAYERS = {"layers": 2}
MOMENTUM = {**PLAIN, "model__optimizer.momentum": 0.9}


def start(runs, name, strategy, way, kill=None, world=2, **options):
    """Start a run, or resume it; return the exit status of every rank."""
    way = json.dumps(way) if isinstance(way, dict) else way
    words = runs.words(name, strategy, **options)
    return on_ranks(words, runs.folder / name, kill=kill, world=world, way=way)


def finish(runs, *arguments, world=2, **options):
    status = start(runs, *arguments, world=world, **options)
    output = (runs.folder / arguments[0] / "output_0").read_text()
    assert status == [0] * world, output


@pytest.mark.parametrize(
    ("strategy", "kind"),
    [
        ("Finetune", "classification"),
        ("EWC", "classification"),
        ("WiseFT", "classification"),
        ("LwF", "classification"),
        ("OLoRA", "instruction"),
    ],
)
def test_two_processes_with_shares_learn_as_one_with_all(tmp_path, strategy, kind):
    vision = {} if kind == "instruction" else LAYERS
    runs = SmallRuns(tmp_path, (20, 17), kind, test_size=7, **vision)
    finish(runs, "one", strategy, "auto", world=1, **PLAIN)
    finish(runs, "two", strategy, SHARDS, **PLAIN)
    one, two = seen(tmp_path / "one"), [seen(tmp_path / "two", rank) for rank in (0, 1)]
    assert len(two[0]["states"]) == 2
    for first, second, alone in zip(two[0]["states"], two[1]["states"], one["states"], strict=True):
        assert same(dict(first), dict(second))
        assert [name for name in far(first, alone, 1e-5) if name.startswith(".model.")] == []
        # What EWC remembers is squares of gradients.
        assert far(first, alone, 1e-3) == []
    assert runs.matrix("one").values == runs.matrix("two").values


@pytest.mark.parametrize("strategy", ["EWC", "ExperienceReplay"])
def test_a_run_in_shards_that_is_killed_resumes_to_the_same_weights(tmp_path, strategy):
    runs = SmallRuns(tmp_path, (12, 9), **LAYERS)
    finish(runs, "alone", strategy, SHARDS)
    checkpoints = runs.path("killed") / "checkpoints"
    for moment in (("step", 3), ("ended", 1), ("step", 5)):
        assert start(runs, "killed", strategy, SHARDS, kill=moment)[0] == KILLED
        if moment[0] == "step":
            state = json.loads((runs.path("killed") / "run.json").read_text())
            assert (checkpoints.parent / state["last_checkpoint"]).is_dir()
    finish(runs, "killed", strategy, SHARDS)
    assert runs.differences("killed", "alone") == []
    assert sorted(file.name for file in checkpoints.iterdir()) == ["task_00.ckpt", "task_01.ckpt"]


@pytest.mark.parametrize("name", ["*.distcp", ".metadata", "meta.pt"])
def test_a_damaged_checkpoint_in_shards_costs_the_steps_of_its_task(tmp_path, name):
    runs = SmallRuns(tmp_path, (12, 9), **LAYERS)
    finish(runs, "alone", "EWC", SHARDS)
    assert start(runs, "killed", "EWC", SHARDS, kill=("step", 7))[0] == KILLED
    [folder] = (runs.path("killed") / "checkpoints").glob("last_*.ckpt")
    file = sorted(folder.glob(name))[-1]
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    file.write_bytes(raw)
    finish(runs, "killed", "EWC", SHARDS)
    output = " ".join((tmp_path / "killed" / "output_0").read_text().split())
    assert f"warning: {folder} is damaged ({file.name if name != '.metadata' else 'the'}" in output
    assert "trained again from the beginning: 'task-b'" in output
    assert runs.differences("killed", "alone") == []


@pytest.mark.parametrize(
    ("first", "then"), [(WHOLE, "auto"), ("auto", WHOLE)], ids=["to_one", "from_one"]
)
def test_a_whole_checkpoint_is_taken_up_with_shares_and_without(tmp_path, first, then):
    runs = SmallRuns(tmp_path, (20,), **LAYERS)
    finish(runs, "alone", "EWC", "auto", world=1, **MOMENTUM)
    worlds = [2 if way is WHOLE else 1 for way in (first, then)]
    assert start(runs, "run", "EWC", first, ("step", 5), worlds[0], **MOMENTUM)[0] == KILLED
    assert (runs.path("run") / "checkpoints" / "last.ckpt").is_file()
    finish(runs, "run", "EWC", then, world=worlds[1], **MOMENTUM)
    assert far(runs.kept("run"), runs.kept("alone"), 1e-3) == []


def test_shards_of_two_are_taken_up_by_one_and_refused_without_sharing(tmp_path):
    runs = SmallRuns(tmp_path, (20,), **LAYERS)
    assert start(runs, "run", "Finetune", SHARDS, kill=("step", 5), **PLAIN)[0] == KILLED
    assert start(runs, "run", "Finetune", "auto", world=1, **PLAIN) == [1]
    assert "is sharded" in (tmp_path / "run" / "output_0").read_text()
    strategy = json.dumps(SHARDS)
    finish(runs, "run", "Finetune", "auto", world=1, trainer__strategy=strategy, **PLAIN)
    finish(runs, "alone", "Finetune", "auto", world=1, **PLAIN)
    assert far(runs.kept("run"), runs.kept("alone"), 1e-5) == []


@pytest.mark.parametrize(
    ("strategy", "kind", "refusal"),
    [
        (
            "AGEM",
            "classification",
            "AGEM needs unsharded gradients, and ModelParallelStrategy shards",
        ),
        ("OSF", "instruction", "use strategy ddp, or use OLoRA instead"),
    ],
)
def test_a_strategy_that_needs_whole_gradients_names_another(tmp_path, strategy, kind, refusal):
    runs = SmallRuns(tmp_path, (20,), kind)
    assert start(runs, "run", strategy, SHARDS) == [1, 1]
    assert refusal in " ".join((tmp_path / "run" / "output_0").read_text().split())


@pytest.mark.parametrize("way", ["ddp", SHARDS], ids=["ddp", "fsdp"])
def test_parameter_groups_a_scheduler_and_a_log_resume_on_two_processes(tmp_path, way):
    runs = SmallRuns(tmp_path, (20, 17), **LAYERS)
    options = {
        "model__warmup_steps": 0,
        "model__lr_schedule": "constant",
        "model__lr_scheduler": "torch.optim.lr_scheduler.StepLR",
        "model__lr_scheduler.step_size": 3,
        "model__param_groups": '{"image": {"weight_decay": 0.1, "layer_decay": 0.7}}',
        "trainer__logger": "true",
        "trainer__log_every_n_steps": 1,
    }
    finish(runs, "whole", "Finetune", way, **options)
    start(runs, "killed", "Finetune", way, ("step", 4), **options)
    start(runs, "killed", "Finetune", way, ("step", 5), **options)
    finish(runs, "killed", "Finetune", way, **options)
    assert runs.differences("killed", "whole") == []
    logs = [runs.path(name) / "logs" / "metrics.csv" for name in ("killed", "whole")]
    assert logs[0].read_text() == logs[1].read_text()
    assert "learning_rate/image/layer_03" in logs[0].read_text()
