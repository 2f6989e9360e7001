"""Errors of configurations that were written with the names before the renaming."""

import csv
import inspect
import re
from pathlib import Path

import pytest
import yaml

from mmcl import models, strategies
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.config.config_errors import ConfigError, renamed_key, validate_config
from mmcl.lightning.run_dir import RunDirectory

TABLE = Path(__file__).parents[2] / "docs" / "renames.csv"


@pytest.fixture(scope="module")
def known():
    options = ["--data.stream=x", "--model.model=OpenCLIP", "--model.strategy=Finetune"]
    cli = ContinualCLI([*options], program="test")
    return {*cli.parser.get_defaults(skip_validation=True).keys()}


def renamed(kind):
    with TABLE.open() as file:
        return [(row["old"], row["new"]) for row in csv.DictReader(file) if row["kind"] == kind]


def test_every_renamed_setting_names_the_new_one(known):
    settings = [pair for pair in renamed("key") if ":" not in pair[0]]
    assert len(settings) > 10
    for old, new in settings:
        assert renamed_key(old, known) == new


def test_every_renamed_argument_of_a_strategy_or_model_names_the_new_one():
    found = 0
    for old, new in renamed("argument"):
        match = re.fullmatch(r"(\w+)\((\w+)=\)", old)
        cls = (
            match
            and getattr(strategies, match[1], None)
            or match
            and getattr(models, match[1], None)
        )
        if cls:
            arguments = inspect.signature(cls).parameters
            assert renamed_key(match[2], arguments) == new.partition("(")[2].rstrip("=)")
            found += 1
    assert found > 40


def test_a_configuration_with_old_keys_is_refused_by_the_new_ones(tmp_path, known):
    strategy = {"class_path": "mmcl.strategies.EWC", "init_args": {"weight": 10.0, "samples": 4}}
    file = tmp_path / "old.yaml"
    old = {"runs": "r", "data": {"global_batch": 8}, "model": {"strategy": strategy}}
    file.write_text(yaml.safe_dump(old))
    errors = "\n".join(validate_config(file, known))
    assert "no setting 'runs': it is called 'output_dir' now" in errors
    assert "no setting 'data.global_batch': it is called 'data.global_batch_size' now" in errors
    assert "EWC has no argument 'weight': it is called 'ewc_lambda' now" in errors
    assert "EWC has no argument 'samples': it is called 'fisher_samples' now" in errors


def test_an_old_option_is_refused_by_the_new_one():
    with pytest.raises(ConfigError, match="--data.limit: it is called 'data.max_samples' now"):
        ContinualCLI(["--data.limit=8"], program="test")


def test_a_run_directory_with_old_keys_is_refused_by_the_new_ones(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    old = {"save_every_steps": 5, "model": {"strategy": {"init_args": {"weight": 1.0}}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    new = {"checkpoint_every_n_steps": 5, "model": {"strategy": {"init_args": {"ewc_lambda": 1.0}}}}
    with pytest.raises(ValueError, match="earlier version") as caught:
        RunDirectory(tmp_path).check_config(new)
    message = str(caught.value)
    assert "'save_every_steps' is called 'checkpoint_every_n_steps' now" in message
    assert "init_args.weight' is called 'model.strategy.init_args.ewc_lambda' now" in message
