"""Runs of LoRA recipes: killed and resumed to the bit, on two processes, replayed and exported."""

import copy

import peft
import pytest
import torch

from mmcl.lightning.config.cli import ContinualCLI
from mmcl.models.tiny_llava.build import TinyLlava
from tests.behaviour.kill_runs import KILLED, command, in_process
from tests.data.small_stream import coloured, dialogue
from tests.distributed.ranks import on_ranks
from tests.distributed.test_two_processes import PLAIN, far
from tests.lightning.small_runs import SmallRuns

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
RECIPES = {
    "continue": {"adapter_mode": "continue", "train_projector": True},
    "merge": {"adapter_mode": "merge", "rank": 2},
    "full": {"rank": 2, "train_towers": ["image", "projector"]},
    "towers": {"rank": 2, "target_towers": ["image", "projector", "text"]},
    "modules": {"rank": 2, "modules_to_save": ["lm_head"], "options": {"use_dora": True}},
    "tokens": {"rank": 2, "trainable_token_indices": [5, 9, 11]},
}


def adapter_of(runs, folder):
    """A peft adapter of the model of some runs, written by peft."""
    lm = copy.deepcopy(TinyLlava(**runs.model["init_args"]).lm)
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    made = peft.get_peft_model(lm, config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    made.save_pretrained(folder)
    return str(folder)


def recipe(runs, kind):
    """A strategy, and options of the run."""
    arguments, options = dict(RECIPES[kind]), {}
    if "adapter_mode" in arguments:
        arguments["adapter"] = adapter_of(runs, runs.folder / "start")
    if kind == "full":
        runs.model["init_args"]["freeze"] = ["text"]
        options["model__param_groups"] = "{projector: 2.0e-4, image: 2.0e-5}"
    return {"class_path": "mmcl.strategies.LoRA", "init_args": arguments}, options


@pytest.mark.parametrize("kind", RECIPES)
def test_a_killed_run_ends_as_one_that_was_left_alone_and_is_exported(kind, tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17), kind="instruction")
    strategy, options = recipe(runs, kind)
    runs.finish("alone", strategy, **options)
    for moment in (("step", 4), ("ended", 1), ("step", 7)):
        assert runs.start("killed", strategy, moment, **options)[0] == KILLED
    runs.finish("killed", strategy, **options)
    assert runs.differences("killed", "alone") == []
    for form in ("transformers",) if kind == "merge" else ("peft", "transformers"):
        words = ["export", str(runs.path("killed")), str(tmp_path / form), "--as", form]
        output = tmp_path / "output"
        assert in_process(command, words, output) == 0, output.read_text()


def test_a_start_that_changed_is_refused_on_resume(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20,), kind="instruction")
    strategy, options = recipe(runs, "merge")
    assert runs.start("run", strategy, ("step", 4), **options)[0] == KILLED
    (tmp_path / "start").rename(tmp_path / "moved")
    strategy["init_args"]["adapter"] = str(tmp_path / "moved")
    runs.finish("run", strategy, **options)
    assert runs.start("other", strategy, ("step", 4), **options)[0] == KILLED
    file = tmp_path / "moved" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x3f")
    status, output = runs.start("other", strategy, **options)
    assert status == 1, output
    assert "Traceback" not in output


def test_two_processes_with_adapted_towers_and_text_alone_train_as_one(tmp_path):
    members = [
        (name, dialogue("Say red.", "red") if name.endswith("json") else content)
        for name, content in coloured(16, name="atrain")
        if not name.endswith("png") or int(name[6:9]) % 4 < 2
    ]
    # A sample in which no image is shown has none, on one of the two processes in every batch.
    kept = {name.partition(".")[0] for name, _ in members if name.endswith("png")}
    members = [
        (name, dialogue("<image>\nWhich?", "red") if name.partition(".")[0] in kept
         and name.endswith("json") else content)
        for name, content in members
    ]  # fmt: skip
    runs = SmallRuns(tmp_path, (16,), "instruction", test_size=7, changes={"a_train": members})
    strategy, _ = recipe(runs, "towers")
    for name, world in (("one", 1), ("two", 2)):
        words = runs.words(name, strategy, **PLAIN)
        status = on_ranks(words, tmp_path / name, world=world)
        assert status == [0] * world, (tmp_path / name / "output_0").read_text()
    assert far(runs.kept("one"), runs.kept("two"), 1e-3) == []


def test_replayed_samples_train_with_an_adapted_tower(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17), kind="instruction")
    lora, _ = recipe(runs, "towers")
    replay = {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"buffer_size": 12}}
    chain = {"class_path": "mmcl.Chain", "init_args": {"strategies": [lora, replay]}}
    runs.finish("run", chain)
    stored = {"class_path": "mmcl.strategies.FeatureReplay", "init_args": {"buffer_size": 12}}
    chain["init_args"]["strategies"] = [lora, stored]
    status, output = runs.start("stored", chain)
    assert status == 1
    assert "parameters of the image tower are trainable" in output
    assert "Traceback" not in output


def test_the_command_line_takes_every_argument_of_a_recipe(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12,), kind="instruction")
    words = runs.words("run", {"class_path": "mmcl.strategies.LoRA"})
    given = {
        "rank": "2", "target_modules": "[q_proj, v_proj]", "target_towers": "[text]",
        "train_towers": "[projector]", "modules_to_save": "[embed_tokens]",
        "trainable_token_indices": "null", "options": "{use_rslora: true}",
    }  # fmt: skip
    words += [f"--model.strategy.{name}={value}" for name, value in given.items()]
    strategy = ContinualCLI(words, program="mmcl train").make_module().strategy
    assert strategy.adapters.target_modules == ["q_proj", "v_proj"]
    assert strategy.train_towers == ("projector",)
    assert strategy.options == {"use_rslora": True}
