"""Every configuration parses, builds with the tiny model, and says what it is for."""

import warnings
from functools import cache
from pathlib import Path

import pytest
import yaml

from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule

HOUSE = Path(__file__).parent.parent
FILES = sorted((HOUSE / "configs").rglob("*.yaml"))
OVERLAYS = [file for file in FILES if file.parent.name == "overlay"]
QUICKSTART = HOUSE / "configs" / "quickstart.yaml"
RECIPES = HOUSE / "configs" / "llava_7b"
ENCODER = "--model.model.init_args.routing_encoder.init_args"
TINY = ["--model.model.model=tiny", "--model.model.pretrained=built-in"]


def title(file):
    return str(file.relative_to(HOUSE / "configs").with_suffix(""))


def words(file):
    """The command line of a configuration; an overlay lies on the quickstart."""
    if file in OVERLAYS:
        return ["--config", str(QUICKSTART), "--config", str(file)]
    if file.parent == RECIPES:
        return recipe(file)
    model = yaml.safe_load(file.read_text())["model"]["model"]
    given = model["init_args"]
    if "start" in given:  # an earlier stage's folder, which is not there yet
        return ["--config", str(file), "--model.model.init_args.start=null"]
    is_clip = model["class_path"].endswith("OpenCLIP")
    return ["--config", str(file), *(TINY if is_clip and given["model"] != "tiny" else [])]


def recipe(file):
    """The command line of a recipe; a method's file lies on a benchmark's."""
    content = yaml.safe_load(file.read_text())
    base = [] if "data" in content and "stream" in content["data"] else [RECIPES / "ucit.yaml"]
    files = [word for each in (*base, file) for word in ("--config", str(each))]
    small = ["--model.model.init_args.model=tiny-llava"]
    if "routing_encoder" in file.read_text():
        small += [f"{ENCODER}.model=tiny", f"{ENCODER}.pretrained=built-in"]
    return [*files, *small]


@cache
def parsed(file):
    return ContinualCLI(words(file))


def flat(value, prefix=""):
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in flat(part, f"{prefix}/{key}").items()}


every_file = pytest.mark.parametrize("file", FILES, ids=title)


@every_file
def test_a_configuration_builds_module_data_and_trainer(file):
    if file.stem == "deepspeed":
        pytest.importorskip("deepspeed")
    cli = parsed(file)
    module, data = cli.make_module(), cli.make_data()
    assert isinstance(module, ContinualModule)
    assert isinstance(data, ContinualDataModule)
    assert data.card.suffix == ".yaml"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*GPU available but not used.*")
        trainer = cli.make_trainer(callbacks=[])
    assert trainer.max_epochs >= 1
    asked = cli.plain()["model"]["strategy"] or {"class_path": "Finetune"}
    assert asked["class_path"].endswith(type(module.strategy).__name__)


@every_file
def test_what_a_configuration_says_is_what_is_used(file):
    used = flat(parsed(file).plain())
    stated = flat(yaml.safe_load(file.read_text()))
    different = {
        key for key, value in stated.items() if value is not None and used.get(key) != value
    }
    changed = {"model", "pretrained", "start"}
    changed |= {f"routing_encoder/init_args/{name}" for name in ("model", "pretrained")}
    assert different <= {f"/model/model/init_args/{name}" for name in changed}


@every_file
def test_a_configuration_begins_with_command_hardware_and_result(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# python train.py --config ")
    assert lines[0].rstrip().endswith(str(file.relative_to(HOUSE)))
    assert lines[1].startswith("# hardware: ")
    assert lines[2].startswith("# result: ")
    assert all(len(line) > 14 for line in lines[:3])


@every_file
def test_a_configuration_has_at_most_60_lines(file):
    assert len(file.read_text().splitlines()) <= 60


@pytest.mark.parametrize("file", OVERLAYS, ids=title)
def test_an_overlay_changes_what_it_names_and_nothing_else(file):
    plain = flat(parsed(QUICKSTART).plain())
    laid = flat(parsed(file).plain())
    changed = {key for key in laid if laid[key] != plain.get(key)}
    assert changed
    named = set(flat(yaml.safe_load(file.read_text())))
    classes = tuple(key.removesuffix("class_path") for key in named if key.endswith("/class_path"))
    assert [key for key in changed if key not in named and not key.startswith(classes)] == []
