"""Stages of a stream: each trains what its settings say, resumes exactly, names what is idle."""

import json
import shutil

import pytest
import torch
import yaml

from tests.behaviour.kill_runs import in_process, snapshots_of
from tests.lightning.small_runs import SmallRuns, same

pytestmark = pytest.mark.slow
STAGES = ("cpt", "dap", "cft")


def staged(folder, stages=STAGES, **options):
    """Small runs on a card whose tasks have these stages."""
    runs = SmallRuns(folder, sizes=(20, 17, 16)[: len(stages)], **options)
    card = yaml.safe_load(runs.card.read_text())
    for task, stage in zip(card["tasks"], stages, strict=True):
        task["stage"] = stage
    runs.card.write_text(yaml.safe_dump(card))
    return runs


def given(**settings):
    return {f"model__stages__{key}": json.dumps(value) for key, value in settings.items()}


def moved(before, after, part):
    names = [name for name in after if part in name and isinstance(after[name], torch.Tensor)]
    assert names
    return [name for name in names if not same(before[name], after[name])]


def test_a_stage_trains_its_parts_and_freezes_the_others(tmp_path):
    runs = staged(tmp_path)
    stages = {"cpt": {"trainable": ["text"]}, "dap": {"trainable": ["image"]}}
    runs.finish("run", **given(**stages))
    first, second, third = (runs.kept("run", task) for task in range(3))
    assert moved(first, second, ".visual.")
    assert moved(first, second, ".transformer.resblocks.0.mlp.c_fc.weight") == [
        "model.clip.visual.transformer.resblocks.0.mlp.c_fc.weight"
    ]
    assert len(moved(second, third, "mlp.c_fc.weight")) == 2


def test_a_stage_has_its_rate_schedule_and_epochs(tmp_path):
    runs = staged(tmp_path)
    stages = {"dap": {"learning_rate": 0.0}, "cft": {"lr_schedule": "constant", "warmup_steps": 0}}
    runs.finish("run", **given(**stages), data__stages__cpt='{"epochs": 1}')
    first, second, third = (runs.kept("run", task) for task in range(3))
    assert moved(first, second, "clip") == []
    assert moved(second, third, "clip")
    ledger = json.loads((runs.path("run") / "ledger.json").read_text())
    assert [cost["steps"] for cost in ledger["tasks"]] == [3, 6, 4]


@pytest.mark.parametrize("strategy", ["Chain", "LwF"])
def test_a_run_with_stages_resumes_from_what_is_on_disk_at_every_write(tmp_path, strategy):
    runs = staged(tmp_path, ("cpt", "dap"))
    stages = {"cpt": {"trainable": ["text"]}, "dap": {"trainable": ["image", "text"]}}
    words = runs.words("alone", strategy, **given(**stages))
    assert in_process(snapshots_of, words, runs.path("alone"), tmp_path / "left") == 0
    left = sorted((tmp_path / "left").iterdir())
    for folder in left[:: 1 if strategy == "Chain" else 4]:
        shutil.rmtree(runs.path("killed"), ignore_errors=True)
        shutil.copytree(folder, runs.path("killed"))
        runs.finish("killed", strategy, **given(**stages))
        assert runs.differences("killed", "alone") == [], folder.name


def test_a_strategys_adapters_are_trained_where_a_stage_trains_no_part(tmp_path):
    runs = staged(tmp_path, ("cpt", "cft"), kind="instruction")
    runs.finish("run", "LoRA", **given(cft={"trainable": []}))
    first, second = runs.kept("run", 0), runs.kept("run", 1)
    assert moved(first, second, "lora_B")


def test_a_stage_that_no_task_has_is_named(tmp_path):
    runs = staged(tmp_path, ("cpt", "cpt"))
    settings = {**given(dap={"learning_rate": 0.1}), "data__stages__cft": '{"epochs": 2}'}
    output = runs.finish("run", **settings)
    assert "model.stages has settings for dap, and no task is of that stage" in output
    assert "data.stages has settings for cft, and no task is of that stage" in output


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (given(cpt={"trainable": ["imgae"]}), "did you mean 'image'? (parts that may be trained"),
        (given(cpt={"trainable": ["image", "nothing*"]}), "has 'nothing*', which is no part"),
        (given(cpt={"lr_schedule": "cosine", "anneal_steps": 2}), "stages has cpt: anneal_steps"),
        (given(sft={"learning_rate": 0.1}), "sft"),
        (given(cpt={"learning_rat": 0.1}), "learning_rat"),
        (
            {"model__stages__cpt__learning_rate": 0.1},
            "give --model.stages.cpt '{learning_rate: 0.1}",
        ),
        ({"data__stages__cpt": '{"mixture": {"general": 0.1}}'}, "the card has no sources"),
        ({"data__stages__cpt": '{"replay_ratio": 1.5}'}, "give more than 0, below 1"),
        ({"data__stages__cpt": '{"epochs": 0}'}, "data.stages.cpt.epochs is 0: give 1 or more"),
    ],
)
def test_a_setting_of_a_stage_that_cannot_be_obeyed_is_refused(tmp_path, settings, sentence):
    runs = staged(tmp_path)
    status, output = runs.start("run", **settings)
    assert status != 0
    assert sentence in output
    assert "before training" not in output


def test_a_part_that_the_model_freezes_cannot_be_trained_by_a_stage(tmp_path):
    runs = staged(tmp_path)
    status, output = runs.start(
        "run", **given(cpt={"trainable": ["image"]}), model__model__init_args__freeze='["image"]'
    )
    assert status != 0
    assert "which the model's own settings or its strategy freeze" in output
