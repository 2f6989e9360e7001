"""A run is not bound to paths or to one file: data may move, lost checkpoints are made again."""

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml

from mmcl.evaluation import RunSummary
from tests.behaviour.kill_runs import KILLED, command, in_process
from tests.behaviour.test_growing_stream import learned_steps, tasks_on_card
from tests.behaviour.test_kills_on_two_processes import on_both
from tests.data.small_stream import labelled, write_tar
from tests.lightning.small_runs import SmallRuns, small_model
from tests.toys.http_server import serving

pytestmark = pytest.mark.slow
SIZES = (16, 14, 12)
# With replay the later tasks take more steps.
IN_SECOND, IN_THIRD = 7, {"ExperienceReplay": 15, "EWC": 11, "FeatureReplay": 11}
FEATURES = {
    "class_path": "mmcl.strategies.FeatureReplay",
    "init_args": {"buffer_size": 4, "storage": "disk"},
}
STRATEGIES = {"ExperienceReplay": "ExperienceReplay", "EWC": "EWC", "FeatureReplay": FEATURES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of three tasks, of which those named after a strategy were left alone."""
    runs = SmallRuns(tmp_path_factory.mktemp("runs"), SIZES)
    for name, strategy in STRATEGIES.items():
        runs.finish(name, strategy)
    return runs


@pytest.fixture
def runs(tmp_path):
    return SmallRuns(tmp_path, SIZES)


def flip(file):
    """Flip one bit in the middle of the largest record of a checkpoint."""
    with zipfile.ZipFile(file) as zipped:
        largest = max(zipped.infolist(), key=lambda entry: entry.file_size)
        content = zipped.read(largest)
    raw = bytearray(file.read_bytes())
    raw[raw.index(content) + len(content) // 2] ^= 0x40
    file.write_bytes(raw)


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


def killed(runs, name, strategy, step):
    status, output = runs.start(name, strategy, ("step", step))
    assert status == KILLED, output
    return runs.path(name) / "checkpoints"


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_mid_task_checkpoint_costs_the_steps_of_its_task(alone, strategy, damage):
    name = f"last {strategy} {damage.__name__}"
    folder = killed(alone, name, STRATEGIES[strategy], IN_SECOND)
    damage(folder / "last.ckpt")
    output = alone.finish(name, STRATEGIES[strategy])
    how = "is missing" if damage is Path.unlink else "is damaged ("
    assert f"warning: {folder / 'last.ckpt'} {how}" in output
    assert "trained again from the beginning: 'task-b'" in output
    assert f"resuming after task 0 ('task-a'), from {folder / 'task_00.ckpt'}" in output
    assert alone.differences(name, strategy) == []
    assert learned_steps(alone, name) == learned_steps(alone, strategy)


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lost_task_checkpoint_costs_its_task(alone, strategy, damage):
    name = f"task {strategy} {damage.__name__}"
    folder = killed(alone, name, STRATEGIES[strategy], IN_THIRD[strategy])
    damage(folder / "task_01.ckpt")
    output = alone.finish(name, STRATEGIES[strategy])
    assert f"warning: {folder / 'task_01.ckpt'} is " in output
    assert "trained again from the beginning: 'task-b', 'task-c'" in output
    assert "resuming after task 0 ('task-a')" in output
    assert alone.differences(name, strategy) == []
    assert learned_steps(alone, name) == learned_steps(alone, strategy)
    states = [json.loads((alone.path(each) / "run.json").read_text()) for each in (name, strategy)]
    assert {**states[0], "seconds": 0} == {**states[1], "seconds": 0}


def test_all_checkpoints_are_lost_and_the_run_killed_again(alone):
    folder = killed(alone, "all", "ExperienceReplay", IN_THIRD["ExperienceReplay"])
    for file in folder.iterdir():
        flip(file)
    status, output = alone.start("all", "ExperienceReplay", ("step", 3))
    assert status == KILLED
    assert "trained again from the beginning: 'task-a', 'task-b', 'task-c'" in output
    assert alone.matrix("all").measured_names() == {"task-a", "task-b", "task-c"}
    assert alone.matrix("all").last_row == 0
    assert "trained again" not in alone.finish("all", "ExperienceReplay")
    assert alone.differences("all", "ExperienceReplay") == []


def test_a_checkpoint_whose_stored_features_are_lost_is_not_resumed_from(alone):
    killed(alone, "rows", FEATURES, 11)
    for file in (alone.path("rows") / "memory" / "features").glob("rows_*"):
        file.unlink()
    output = alone.finish("rows", FEATURES)
    assert "task_01.ckpt needs " in output
    assert "trained again from the beginning: 'task-a', 'task-b', 'task-c'" in output
    assert alone.differences("rows", "FeatureReplay") == []


def test_a_task_whose_shards_were_released_is_not_trained_again(runs):
    folder = killed(runs, "run", "ExperienceReplay", IN_THIRD["ExperienceReplay"])
    released = runs.card.parent / "b-train.tar"
    released.rename(runs.folder / "b-train.tar")
    flip(folder / "task_01.ckpt")
    before = (runs.path("run") / "run.json").read_bytes()
    status, output = runs.start("run", "ExperienceReplay")
    assert status == 1
    assert "task 'task-b' cannot be trained again without its shards: restore" in output
    assert (runs.path("run") / "run.json").read_bytes() == before
    (runs.folder / "b-train.tar").rename(released)
    runs.finish("run", "ExperienceReplay")
    runs.finish("alone", "ExperienceReplay")
    assert runs.differences("run", "alone") == []


def test_without_an_older_checkpoint_a_new_task_is_learned_and_its_earlier_cell_is_empty(runs):
    runs.finish("whole")
    full = yaml.safe_load(runs.card.read_text())["tasks"]
    tasks_on_card(runs, lambda tasks: tasks[:2])
    runs.finish("grown")
    tasks_on_card(runs, lambda tasks: full)
    first = runs.path("grown") / "checkpoints" / "task_00.ckpt"
    content = first.read_bytes()
    for damage in (Path.unlink, flip):
        if damage is flip:
            first.write_bytes(content)
        damage(first)
        sentence = "after 'task-a', 'task-c' cannot be measured; restore the file and give the same"
        assert sentence in runs.finish("grown")
        matrix, expected = runs.matrix("grown"), runs.matrix("whole")
        assert matrix.missing() == [(1, 2)]
        matrix.set(1, 2, expected.get(1, 2))
        assert matrix.values == expected.values
        summary = RunSummary.read(runs.path("grown") / "summary.json")
        assert not summary.finished
        assert [sentence in warning for warning in summary.warnings] == [True]
    first.write_bytes(content)
    assert "cannot be measured" not in runs.finish("grown")
    assert runs.differences("grown", "whole") == []
    summary = RunSummary.read(runs.path("grown") / "summary.json")
    assert (summary.finished, list(summary.warnings)) == (True, [])


def test_a_finished_run_without_its_last_checkpoint_shows_its_result_and_trains_nothing(runs):
    runs.finish("run")
    (runs.path("run") / "checkpoints" / "task_02.ckpt").unlink()
    before = (runs.path("run") / "matrix.json").read_bytes()
    output = runs.finish("run")
    assert "task_02.ckpt is missing: restore it to evaluate or export that state" in output
    assert "average accuracy" in output
    assert (runs.path("run") / "matrix.json").read_bytes() == before
    assert not (runs.path("run") / "checkpoints" / "task_02.ckpt").exists()


def test_two_processes_are_set_back_together(runs):
    seen = runs.folder / "seen"
    assert on_both(runs.words("alone", "ExperienceReplay"), seen) == [0, 0]
    words = runs.words("run", "ExperienceReplay")
    on_both(words, seen, ("step", IN_THIRD["ExperienceReplay"], (0, 1)))
    flip(runs.path("run") / "checkpoints" / "task_01.ckpt")
    assert on_both(words, seen) == [0, 0]
    output = " ".join((seen / "output_0").read_text().split())
    assert "trained again from the beginning: 'task-b', 'task-c'" in output
    assert runs.differences("run", "alone") == []


def rename_shards(runs, names):
    """Rename the shards of a stream and on its card, which states their hashes if it did."""
    text = runs.card.read_text()
    for old, new in names.items():
        (runs.card.parent / new).parent.mkdir(exist_ok=True)
        (runs.card.parent / old).rename(runs.card.parent / new)
        text = text.replace(old, new)
    runs.card.write_text(text)


def move(runs, name="elsewhere"):
    """Move the stream to another folder, under another name of the card."""
    folder = runs.card.parent.rename(runs.folder / name)
    runs.card = (folder / runs.card.name).rename(folder / f"{name}.yaml")


RENAMED = {"a-train.tar": "shards/first.tar", "b-train.tar": "b.tar", "a-test.tar": "eval-a.tar"}


@pytest.mark.parametrize("has_hashes", [False, True])
def test_a_run_resumes_after_its_data_was_moved_and_renamed(runs, has_hashes):
    if has_hashes:
        card = yaml.safe_load(runs.card.read_text())
        shards = sorted(runs.card.parent.glob("*.tar"))
        card["hashes"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in shards}
        runs.card.write_text(yaml.safe_dump(card))
    runs.finish("alone", "ExperienceReplay")
    killed(runs, "run", "ExperienceReplay", IN_SECOND)
    rename_shards(runs, RENAMED)
    move(runs)
    killed(runs, "run", "ExperienceReplay", 2)
    move(runs, "again")
    runs.finish("run", "ExperienceReplay")
    assert runs.differences("run", "alone") == []
    config = yaml.safe_load((runs.path("run") / "config.yaml").read_text())
    assert config["data"]["stream"] == str(runs.card)
    assert in_process(command, ["evaluate", str(runs.path("run"))]) == 0
    assert runs.matrix("run/evaluation").values == runs.matrix("run").values


def test_a_run_over_urls_resumes_over_a_folder_in_the_same_order(runs, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    cache = {"data__cache_dir": str(runs.folder / "cache"), "data__shuffle_window": 1}
    card = yaml.safe_load(runs.card.read_text())
    for place, part in enumerate(("more", "rest")):
        members = labelled(6, (2 * place, 2 * place + 1), name=f"{part}-")
        write_tar(runs.card.parent / f"{part}.tar", members)
        card["tasks"][place]["train"] = [card["tasks"][place]["train"], f"{part}.tar"]
    runs.card.write_text(yaml.safe_dump(card))
    local = runs.card.read_text()
    with serving() as site:
        remote = local
        for file in runs.card.parent.glob("*.tar"):
            remote = remote.replace(file.name, site.put(f"/{file.name}", file.read_bytes()))
        runs.card.write_text(remote)
        runs.finish("alone", **cache)
        assert runs.start("run", kill=("step", IN_SECOND), **cache)[0] == KILLED
    runs.card.write_text(local)
    runs.finish("run", **cache)
    assert runs.differences("run", "alone") == []
    runs.finish("local", **cache)
    assert runs.differences("local", "alone") != []


def test_a_run_without_its_notes_of_inputs_resumes_as_one_of_an_earlier_version(runs):
    runs.finish("alone", "EWC")
    killed(runs, "run", "EWC", IN_SECOND)
    (runs.path("run") / "inputs.json").unlink()
    move(runs)
    killed(runs, "run", "EWC", 2)
    rename_shards(runs, RENAMED)
    runs.finish("run", "EWC")
    assert runs.differences("run", "alone") == []


def test_renamed_data_without_notes_is_refused(runs):
    killed(runs, "run", "EWC", IN_SECOND)
    (runs.path("run") / "inputs.json").unlink()
    rename_shards(runs, RENAMED)
    status, output = runs.start("run", "EWC")
    assert status == 1
    assert "task 0 ('task-a') is not the one this run was trained on" in output


def test_a_renamed_run_directory_resumes(runs):
    runs.finish("alone", "ExperienceReplay")
    killed(runs, "run", "ExperienceReplay", IN_SECOND)
    runs.path("run").rename(runs.path("renamed"))
    runs.finish("renamed", "ExperienceReplay")
    assert runs.differences("renamed", "alone") == []
    moved = runs.folder / "archive"
    shutil.move(runs.path("renamed"), moved)
    for words in (["evaluate", str(moved)], ["report", str(moved)]):
        assert in_process(command, words) == 0
    assert runs.matrix(moved / "evaluation").values == runs.matrix("alone").values


def test_a_moved_architecture_file_is_recognized_and_another_one_refused(runs):
    runs.finish("alone", "EWC")
    killed(runs, "run", "EWC", IN_SECOND)
    before = (runs.path("run") / "config.yaml").read_bytes()
    (runs.folder / "other").mkdir()
    runs.model["init_args"]["model"] = small_model(runs.folder / "other", width=32)
    status, output = runs.start("run", "EWC")
    assert status == 1
    assert "another configuration: model.model.init_args.model is " in output
    assert (runs.path("run") / "config.yaml").read_bytes() == before
    moved = (runs.folder / "small.json").rename(runs.folder / "other" / "same.json")
    runs.model["init_args"]["model"] = str(moved)
    runs.finish("run", "EWC")
    assert runs.differences("run", "alone") == []
    assert str(moved) in (runs.path("run") / "config.yaml").read_text()


def other_samples(runs, shard, count, own, swap=False):
    """Write other samples, or other labels of the same ones, under the name of a shard."""
    part = shard.removesuffix(".tar").replace("-", "")
    members = labelled(count, own, name=part if swap else "zz")
    members = [(name.replace("zz", part), content) for name, content in members]
    if swap:
        labels = {str(own[0]).encode(): str(own[1]).encode(), str(own[1]).encode(): b"%d" % own[0]}
        members = [(n, labels.get(c, c) if n.endswith(".cls") else c) for n, c in members]
    write_tar(runs.card.parent / shard, members)


@pytest.mark.parametrize(
    ("shard", "count", "own", "swap", "sentence"),
    [
        (
            "a-train.tar",
            16,
            (0, 1),
            False,
            "task 'task-a' (train) is not what this run was",
        ),
        (
            "b-train.tar",
            14,
            (2, 3),
            False,
            "task 'task-b' (train) is not what this run was",
        ),
        ("b-train.tar", 14, (2, 3), True, "task 'task-b' (train) is not what this run was"),
        (
            "a-test.tar",
            6,
            (0, 1),
            False,
            "task 'task-a' (test) is not what this run was trained",
        ),
        (
            "c-test.tar",
            6,
            (4, 5),
            True,
            "task 'task-c' (test) is not what this run was measured",
        ),
    ],
)
def test_other_data_under_the_same_name_is_refused(runs, shard, count, own, swap, sentence):
    killed(runs, "run", "ExperienceReplay", IN_SECOND)
    content = (runs.card.parent / shard).read_bytes()
    other_samples(runs, shard, count, own, swap)
    status, output = runs.start("run", "ExperienceReplay")
    assert status == 1
    assert f"the data of {sentence}" in output
    assert f"shard {shard} has other content than before" in output
    (runs.card.parent / shard).write_bytes(content)
    runs.finish("run", "ExperienceReplay")
    runs.finish("alone", "ExperienceReplay")
    assert runs.differences("run", "alone") == []


def test_training_data_of_a_later_task_may_still_change(runs):
    killed(runs, "run", "ExperienceReplay", IN_SECOND)
    other_samples(runs, "c-train.tar", 12, (4, 5))
    runs.finish("run", "ExperienceReplay")
    runs.finish("alone", "ExperienceReplay")
    assert runs.differences("run", "alone") == []


def test_the_order_of_shards_is_a_part_of_the_data(runs):
    card = yaml.safe_load(runs.card.read_text())
    card["tasks"][0]["train"] = ["a-train.tar", "a2-train.tar"]
    write_tar(runs.card.parent / "a2-train.tar", labelled(8, (0, 1), name="second"))
    runs.card.write_text(yaml.safe_dump(card))
    killed(runs, "run", "Finetune", 3)
    card["tasks"][0]["train"].reverse()
    runs.card.write_text(yaml.safe_dump(card))
    status, output = runs.start("run")
    assert status == 1
    assert "shard a2-train.tar has other content than a-train.tar had" in output
