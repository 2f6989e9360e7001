"""``mmcl.testing``: every check fails for a strategy that breaks it, and the command says so."""

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import mmcl
from mmcl.strategies import NCM
from mmcl.testing import CHECKS, ContractError, StrategyContract, check_strategy
from mmcl.testing.__main__ import main

ROOT = Path(__file__).parent.parent
BY_NAME = {check.__name__.removeprefix("check_"): check for check in CHECKS.values()}


class Counts(mmcl.Strategy):
    """Adds a number that is in no checkpoint."""

    steps = 0

    def after_step(self, model, batch, output):
        self.steps += 1

    def transform_output(self, model, batch, output):
        return replace(
            output, logits=output.logits + torch.eye(output.logits.shape[1])[0] * self.steps
        )


class Weighs(mmcl.Strategy):
    """Counts the steps of a task, and forgets them in a checkpoint in its middle."""

    def begin_task(self, model, task):
        self.steps = 0

    def after_step(self, model, batch, output):
        self.steps += 1

    def penalty(self, model, batch, output):
        return {"weighed": self.steps * model.names.weight.square().sum()}


class Centers(mmcl.Strategy):
    def transform_output(self, model, batch, output):
        return replace(output, logits=output.logits - output.logits.mean(0))


class Stores(mmcl.Strategy):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def transform_output(self, model, batch, output):
        self.seen += 1
        return output


class Merges(mmcl.Strategy):
    @contextmanager
    def merged_adapters(self, model):
        model.names.weight.data[0] += 1
        yield


class Draws(mmcl.Strategy):
    def begin_task(self, model, task):
        self.register_buffer("noise", torch.rand(3))


class Writes(mmcl.Strategy):
    def after_step(self, model, batch, output):
        batch.labels.fill_(0)


class Idles(mmcl.Strategy):
    def penalty(self, model, batch, output):
        return {"idle": model.names.weight.sum() * 0}


class Empty(mmcl.Strategy):
    def buffer_sizes(self):
        return {"memory": 0}


class Pickles(mmcl.Strategy):
    def get_extra_state(self):
        return Empty()

    def set_extra_state(self, state):
        pass


class Assumes(mmcl.Strategy):
    def attach(self, model):
        self.dims = model.prompt_dims


class Alone(mmcl.Strategy):
    alone = 0  # how many were built: those in chains are built after the lone one

    def __init__(self):
        super().__init__()
        Alone.alone += 1
        self.number = Alone.alone

    def objective(self, model, batch, output):
        return self.number * nn.functional.cross_entropy(output.logits, batch.labels)


class Fails(mmcl.Strategy):
    def penalty(self, model, batch, output):
        mixed = batch.is_replay is not None and bool(batch.is_replay.any())
        return {"nan": model.names.weight.sum() * torch.nan} if mixed else {}


BROKEN = {
    "finished_task": (Counts, "predictions of the loaded strategy 0.0 differs"),
    "middle_of_task": (Weighs, r"after the task, model\.\S+ differs"),
    "per_sample": (Centers, "scores of a sample alone differ by"),
    "inference": (Stores, "after a prediction, strategy.seen differs"),
    "merged_adapters": (Merges, "after merged_adapters, model.names.weight differs"),
    "seed": (Draws, "in a second run, strategy.noise differs"),
    "hooks_write_nothing": (Writes, "in a step, the batch's labels differs"),
    "penalties": (Idles, "penalties without gradient in both tasks: idle"),
    "buffers": (Empty, "empty after a task: memory"),
    "state": (Pickles, "Weights only load failed"),
    "missing_members": (Assumes, "attach raises AttributeError: .* mmcl.core.require"),
    "chain": (Alone, "in a chain, the model's .* differs"),
    "chain_with_replay": (Fails, "scores are not numbers"),
}


@pytest.mark.parametrize("check", BY_NAME)
def test_a_check_fails_for_a_strategy_that_breaks_it(check):
    strategy, message = BROKEN[check]
    Alone.alone = 0
    contract = StrategyContract(strategy, "classes")
    with pytest.raises(Exception, match=message) as error:
        BY_NAME[check](contract)
    assert check == "state" or error.type is ContractError


def test_a_strategy_that_takes_one_of_the_models_is_refused_by_the_other():
    results = list(check_strategy(NCM))
    assert [r.check for r in results if r.model == "classes"] == list(CHECKS)
    assert {r.outcome for r in results if r.model == "classes"} == {"ok"}
    (refused,) = [r for r in results if r.model == "answers"]
    assert refused.outcome == "refused"
    assert "NCM needs class scores, and TinyLlava generates text" in refused.message


def test_a_strategy_that_takes_no_model_fails():
    class Wants(mmcl.Strategy):
        def attach(self, model):
            mmcl.core.require(model, "transformer_blocks", by=self)

    outcomes = [result.outcome for result in check_strategy(Wants)]
    assert outcomes == ["refused", "failed"]


CLOSE = """
import mmcl

class Close(mmcl.Strategy):
    def __init__(self, l2=1.0, broken=False):
        super().__init__()
        self.l2, self.broken = l2, broken

    def buffer_sizes(self):
        return {"memory": 0} if self.broken else {}
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    (tmp_path / "my_close.py").write_text(CLOSE)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_command_prints_a_line_per_check_and_its_status_says_whether_all_hold(user, capsys):
    options = ["my_close:Close", "--args", '{"l2": 0.1}', "--model", "classes"]
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"ok      classes  {check}" for check in CHECKS), "Close holds the contract"]
    options[2] = '{"broken": true}'
    assert main(options) == 1
    lines = capsys.readouterr().out.splitlines()
    assert (
        "failed  classes  Every buffer holds something after a task. empty after a task: memory"
        in lines
    )
    assert lines[-1] == "1 failed"


@pytest.mark.slow
def test_the_command_finds_a_strategy_in_the_working_directory(user, tmp_path):
    words = [sys.executable, "-m", "mmcl.testing", "my_close:Close", "--model", "classes"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("Close holds the contract\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["Close"], "the strategy is 'Close': give its module too"),
        (["my_close:Far"], "my_close has no class 'Far'"),
        (["my_close:mmcl"], "my_close:mmcl is no strategy: inherit from mmcl.Strategy"),
        (["my_far:Close"], "No module named 'my_far'"),
        (["my_close:Close", "--args", "l2=1"], "--args is l2=1: give a JSON object"),
        (["my_close:Close", "--args", '{"l3": 1}'], "unexpected keyword argument 'l3'"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(user, capsys, options, message):
    with pytest.raises(SystemExit) as status:
        main(options)
    assert status.value.code == 2
    assert message in capsys.readouterr().err
