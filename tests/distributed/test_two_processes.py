"""Two processes remember, learn and answer as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmcl.evaluation.predictions import predictions_path, read_predictions
from tests.behaviour.kill_runs import KILLED
from tests.data.small_stream import coloured, dialogue
from tests.distributed.ranks import on_ranks, seen
from tests.lightning.small_runs import SmallRuns, all_strategies, same

pytestmark = pytest.mark.slow
CLOSED_FORM = {"NCM", "RanPAC"}
# Adam would blow up rounding wherever a gradient is next to nothing.
PLAIN = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 0.1}


def flat(value, name=""):
    """All tensors and values of a state, by dotted name; rows of a memory in order of hash.

    Where a row sits in the table hangs on how many came at once, and nothing hangs on that.
    """
    if isinstance(value, dict) and "columns" in value:
        order = value["priorities"].argsort()
        columns = {name: column[order] for name, column in value["columns"].items()}
        value = {
            **columns,
            "priorities": value["priorities"][order],
            "groups": value["groups"][order],
        }
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{name}.{key}").items()}
    return {name: value}


def far(left, right, tolerance):
    """Names at which two states are more than ``tolerance`` of the largest number apart."""
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    return [name for name in left if not _is_near(left[name], right[name], tolerance)]


def _is_near(left, right, tolerance):
    if not isinstance(left, Tensor) or not left.is_floating_point():
        return same(left, right)
    if left.shape != right.shape:
        return False
    left, right = left.double(), right.double()
    largest = max(1e-12, float(right.abs().max()) if right.numel() else 0)
    return bool(((left - right).abs() <= tolerance * largest).all())


def both(folder, strategy, kind="classification", sizes=(20, 17), **options):
    """Run on one process and on two; return the runs."""
    runs = SmallRuns(folder, sizes, kind, test_size=7)
    for name, world in (("one", 1), ("two", 2)):
        words = runs.words(name, strategy, **options)
        status = on_ranks(words, folder / name, world=world)
        assert status == [0] * world, (folder / name / "output_0").read_text()
    return runs


def global_batches(folder):
    """The batches of both ranks put together, row i of rank r at place i * 2 + r."""
    joined = []
    for (task, first), (other, second) in zip(
        seen(folder, 0)["batches"], seen(folder, 1)["batches"], strict=True
    ):
        assert task == other
        rows = torch.zeros(len(first) + len(second), 2, dtype=torch.int64)
        rows[0::2], rows[1::2] = first, second
        joined.append((task, rows))
    return joined


@pytest.mark.parametrize("strategy", all_strategies())
def test_two_processes_remember_and_learn_as_one(tmp_path, strategy):
    runs = both(tmp_path, strategy, **({} if strategy in CLOSED_FORM else PLAIN))
    one, two = seen(tmp_path / "one"), [seen(tmp_path / "two", rank) for rank in (0, 1)]
    assert len(two[0]["states"]) == 2
    for first, second in zip(two[0]["states"], two[1]["states"], strict=True):
        assert same(dict(first), dict(second))
    assert same(one["batches"], global_batches(tmp_path / "two"))
    assert far(two[0]["states"][-1], one["states"][-1], tolerance=1e-3) == []
    for left, right in zip(runs.matrix("one").values, runs.matrix("two").values, strict=True):
        assert left == pytest.approx(right, abs=1.01 / 7)


@pytest.mark.parametrize("strategy", ["NCM", "RanPAC", "EWC", "LwF"])
def test_what_is_computed_from_a_task_is_the_one_process_answer(tmp_path, strategy):
    # Nothing moves at a rate of 0, so that only the sums over ranks are compared.
    still = {**PLAIN, "model__optimizer.lr": 0.0}
    both(tmp_path, strategy, **({} if strategy in CLOSED_FORM else still))
    one, two = (seen(tmp_path / name)["states"] for name in ("one", "two"))
    for left, right in zip(one, two, strict=True):
        assert far(left, right, tolerance=1e-6) == []


@pytest.mark.parametrize("strategy", ["Finetune", "FeatureReplay"])
def test_captions_are_compared_with_those_of_all_ranks(tmp_path, strategy):
    both(tmp_path, strategy, kind="captioning", **PLAIN)
    one, two = seen(tmp_path / "one"), seen(tmp_path / "two")
    assert same(one["batches"], global_batches(tmp_path / "two"))
    assert far(two["states"][-1], one["states"][-1], tolerance=1e-3) == []


@pytest.mark.parametrize("strategy", all_strategies("instruction"))
def test_two_processes_learn_to_answer_as_one(tmp_path, strategy):
    runs = both(tmp_path, strategy, kind="instruction", **PLAIN)
    one, two = seen(tmp_path / "one"), [seen(tmp_path / "two", rank) for rank in (0, 1)]
    assert len(two[0]["states"]) == 2
    for first, second in zip(two[0]["states"], two[1]["states"], strict=True):
        assert same(dict(first), dict(second))
    assert same(one["batches"], global_batches(tmp_path / "two"))
    left, right = (comparable(noted["states"][-1]) for noted in (two[0], one))
    assert far(left, right, tolerance=1e-3) == []
    for left, right in zip(runs.matrix("one").values, runs.matrix("two").values, strict=True):
        assert left == pytest.approx(right, abs=1.01 / 7)
    for row in range(3):
        keys = [
            [answer.key for answer in read_predictions(predictions_path(runs.path(name), row, 0))]
            for name in ("one", "two")
        ]
        assert keys[0] == keys[1]
        assert len(keys[0]) == 7


def comparable(state):
    """A state without what rounding may turn into something else.

    Files are named by what is in them, and singular vectors have a sign that nothing hangs on.
    """
    kept = {name: value for name, value in state.items() if "files._extra_state" not in name}
    signless = ("U_low", "V_low")
    return {n: v.abs() if any(word in n for word in signless) else v for n, v in kept.items()}


def test_answers_of_uneven_lengths_are_averaged_over_the_tokens_of_both_ranks(tmp_path):
    members = coloured(16, name="atrain")
    long = dialogue("<image>\nWhat do you see?", "a small square that is red all over")
    members = [
        (name, long if name in ("atrain001.json", "atrain006.json") else content)
        for name, content in members
    ]
    runs = SmallRuns(tmp_path, sizes=(16,), kind="instruction", changes={"a_train": members})
    for name, world in (("one", 1), ("two", 2)):
        words = runs.words(name, **PLAIN)
        assert on_ranks(words, tmp_path / name, world=world) == [0] * world
    one, two = seen(tmp_path / "one"), seen(tmp_path / "two")
    assert far(two["states"][-1], one["states"][-1], tolerance=1e-4) == []


def test_features_on_disk_are_written_once_and_outlive_a_kill_of_both_ranks(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17), kind="instruction")
    assert on_ranks(runs.words("alone", "FeatureReplay"), tmp_path / "seen") == [0, 0]
    words = runs.words("killed", "FeatureReplay")
    for moment in (("ended", 1), ("write", 2), ("step", 7), ("ended", 1)):
        assert on_ranks(words, tmp_path / "seen", kill=moment)[0] == KILLED
    assert on_ranks(words, tmp_path / "seen") == [0, 0]
    assert runs.differences("killed", "alone") == []
    kept = [
        sorted(file.name for file in (runs.path(name) / "memory" / "features").iterdir())
        for name in ("killed", "alone")
    ]
    assert kept[0] == kept[1]
    assert all(name.startswith("rows_") for name in kept[0])


@pytest.mark.parametrize("strategy", ["DarkReplay", "AGEM"])
def test_parts_of_a_batch_are_accumulated_on_both_ranks(tmp_path, strategy):
    options = {**PLAIN, "data__micro_batch_size": 2}
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    assert on_ranks(runs.words("two", strategy, **options), tmp_path / "two") == [0, 0]
    assert on_ranks(runs.words("one", strategy, **PLAIN), tmp_path / "one", world=1) == [0]
    assert same(*(dict(seen(tmp_path / "two", rank)["states"][-1]) for rank in (0, 1)))


@pytest.mark.parametrize("strategy", ["ExperienceReplay", "DarkReplay", "EWC"])
def test_a_run_of_two_that_is_killed_resumes_to_the_same_end(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    assert on_ranks(runs.words("alone", strategy), tmp_path / "seen") == [0, 0]
    words = runs.words("killed", strategy)
    for moment in (("step", 4), ("write", 2), ("ended", 1), ("step", 5), ("score", 2)):
        assert on_ranks(words, tmp_path / "seen", kill=moment)[0] == KILLED
    assert on_ranks(words, tmp_path / "seen") == [0, 0]
    assert runs.differences("killed", "alone") == []


def test_a_run_may_resume_with_another_number_of_devices(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    words = runs.words("run", "ExperienceReplay", **PLAIN)
    assert on_ranks(words, tmp_path / "two", kill=("step", 9))[0] == KILLED
    assert on_ranks(words, tmp_path / "one", world=1) == [0]
    runs.finish("alone", "ExperienceReplay", **PLAIN)
    assert far(runs.kept("run"), runs.kept("alone"), tolerance=1e-3) == []


def test_fewer_test_samples_than_processes_are_refused_by_both(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20,), test_size=1)
    assert on_ranks(runs.words("run"), tmp_path / "seen") == [1, 1]
    for rank in (0, 1):
        output = (tmp_path / "seen" / f"output_{rank}").read_text()
        assert "the test split of 'task-a' has 1 samples for 2 devices: use fewer" in output


def test_lightnings_own_launch_does_what_the_forked_ranks_do(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12,))
    assert on_ranks(runs.words("forked", "DarkReplay"), tmp_path / "seen") == [0, 0]
    options = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    launched = subprocess.run(
        [sys.executable, "train.py", *runs.words("launched", "DarkReplay"), *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr
    assert runs.differences("launched", "forked") == []
    assert launched.stdout.count("report: ") == 1
    assert (runs.path("launched") / "report.html").is_file()


def test_the_costs_of_two_devices_are_those_of_one(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(21, 17))
    ledgers = []
    for world in (1, 2):
        words = runs.words(f"on{world}", "ExperienceReplay", **PLAIN)
        assert on_ranks(words, tmp_path / f"out{world}", world=world) == [0] * world
        ledgers.append(json.loads((runs.path(f"on{world}") / "ledger.json").read_text())["tasks"])
    for one, two in zip(*ledgers, strict=True):
        for name in ("steps", "samples_new", "samples_replayed"):
            assert one[name] == two[name], name
    assert [task["samples_new"] for task in ledgers[1]][0] % 21 == 0
    assert ledgers[1][0]["samples_replayed"] == 0
