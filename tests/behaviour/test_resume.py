"""Kill a run at any moment, give the same command again: the same weights and the same matrix."""

import shutil

import pytest
import yaml

from tests.behaviour.kill_runs import KILLED, command, in_process, snapshots_of
from tests.lightning.small_runs import SmallRuns, all_strategies

pytestmark = pytest.mark.slow
# One after the other, each in a start of its own: in the first task between two saves, while its
# checkpoint is written, between its end_task and the checkpoint after it; then in the middle of
# the second task, and while the row after that is scored.
MOMENTS = [("step", 4), ("write", 2), ("ended", 1), ("step", 7), ("score", 2)]
# What takes no step is killed where the others end a task, keep its checkpoint and score it.
MOMENTS_WITHOUT_STEPS = [("ended", 1), ("write", 2), ("score", 2), ("ended", 1)]
CLOSED_FORM = {"NCM", "RanPAC"}


@pytest.mark.parametrize("strategy", all_strategies())
def test_a_run_killed_again_and_again_ends_as_one_that_was_left_alone(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    runs.finish("alone", strategy)
    outputs = []
    for moment in MOMENTS_WITHOUT_STEPS if strategy in CLOSED_FORM else MOMENTS:
        status, output = runs.start("killed", strategy, kill=moment)
        assert status == KILLED, (moment, output)
        outputs.append(output)
    outputs.append(runs.finish("killed", strategy))
    assert any("resuming" in output for output in outputs)
    assert runs.differences("killed", "alone") == []


def test_a_run_killed_at_every_step_ends_the_same(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(16, 14))
    runs.finish("alone", "ExperienceReplay", checkpoint_every_n_steps=0)
    second = ("step", 2)
    for _ in range(4 + 8 - 1):  # every step but the very first
        status, output = runs.start(
            "killed", "ExperienceReplay", second, checkpoint_every_n_steps=1
        )
        assert status == KILLED, output
    runs.finish("killed", "ExperienceReplay")
    assert runs.differences("killed", "alone") == []


def test_what_is_on_disk_is_enough_at_every_write(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12, 10))
    words = runs.words("alone", "DarkReplay")
    assert in_process(snapshots_of, words, runs.path("alone"), tmp_path / "left") == 0
    left = sorted((tmp_path / "left").iterdir())
    assert len(left) > 20
    for folder in left:
        shutil.rmtree(runs.path("killed"), ignore_errors=True)
        shutil.copytree(folder, runs.path("killed"))
        runs.finish("killed", "DarkReplay")
        assert runs.differences("killed", "alone") == [], folder.name


@pytest.mark.parametrize("count", [1, 700, 1700])
def test_shards_whose_building_was_killed_are_the_same(tmp_path, count):
    words = ["data", "build", "digits"]
    assert in_process(command, [*words, "--out", str(tmp_path / "alone")]) == 0
    killed = [*words, "--out", str(tmp_path / "killed")]
    assert in_process(command, killed, None, ("sample", count)) == KILLED
    assert in_process(command, killed) == 0
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("alone", "killed")
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ({"patch_dropout": 0.5}, {}),
        ({}, {"data__num_workers": 2}),
        ({}, {"data__micro_batch_size": 3}),
    ],
    ids=["dropout", "workers", "accumulation"],
)
def test_a_killed_run_resumes_with(tmp_path, model, options):
    runs = SmallRuns(tmp_path, sizes=(20, 16), **model)
    runs.finish("alone", "DarkReplay", **options)
    for moment in (("step", 5 * (3 if "data__micro_batch_size" in options else 1)), ("ended", 2)):
        assert runs.start("killed", "DarkReplay", moment, **options)[0] == KILLED
    runs.finish("killed", "DarkReplay", **options)
    assert runs.differences("killed", "alone") == []


@pytest.mark.parametrize("strategy", ["EWC", "FeatureReplay"])
def test_a_killed_run_resumes_with_captions(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(20, 16), kind="captioning")
    runs.finish("alone", strategy)
    for moment in (("step", 5), ("ended", 2), ("score", 1)):
        assert runs.start("killed", strategy, moment)[0] == KILLED
    runs.finish("killed", strategy)
    assert runs.differences("killed", "alone") == []


def test_dropout_is_the_seeds_and_the_places_alone(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20,), patch_dropout=0.5)
    runs.finish("first")
    runs.finish("second")
    runs.finish("other", seed_everything=1)
    assert runs.differences("first", "second") == []
    assert runs.differences("first", "other") != []


def test_number_of_workers_changes_nothing_and_may_change_between_two_starts(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 16))
    runs.finish("alone", "ExperienceReplay")
    assert runs.start("killed", "ExperienceReplay", ("step", 9))[0] == KILLED
    runs.finish("killed", "ExperienceReplay", data__num_workers=2, data__eval_batch_size=3)
    assert runs.differences("killed", "alone") == []
    config = yaml.safe_load((runs.path("killed") / "config.yaml").read_text())
    assert config["data"]["num_workers"] == 0


def test_a_resumed_run_says_what_it_resumes_from(runs):
    assert runs.start("run", kill=("step", 4))[0] == KILLED
    output = runs.start("run", kill=("score", 2))[1]
    checkpoint = runs.path("run") / "checkpoints" / "last.ckpt"
    assert f"resuming in task 0 ('task-a') at step 2, from {checkpoint}" in output
    output = runs.finish("run")
    checkpoint = runs.path("run") / "checkpoints" / "task_00.ckpt"
    assert f"resuming after task 0 ('task-a'), from {checkpoint}" in output


def test_the_same_command_on_a_finished_run_shows_its_result_and_changes_nothing(runs):
    runs.finish("run")
    files = [*runs.path("run").glob("checkpoints/*"), runs.path("run") / "matrix.json"]
    before = {file: file.stat().st_mtime_ns for file in files}
    output = runs.finish("run")
    assert "all 3 tasks are finished" in output
    assert "average accuracy" in output
    assert before == {file: file.stat().st_mtime_ns for file in files}


def test_another_configuration_is_refused_with_the_difference(runs):
    runs.finish("run")
    status, output = runs.start("run", model__learning_rate=0.5)
    assert status == 1
    assert "another configuration: model.learning_rate is 0.003 there and 0.5 here" in output
    assert "Traceback" not in output
