"""Runs of a model that answers: killed and resumed, bad samples, answers that fail, rescoring."""

import json
import shutil

import pytest

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.predictions import predictions_path, read_predictions
from tests.behaviour.kill_runs import KILLED, command, in_process, snapshots_of
from tests.data.small_stream import coloured, dialogue
from tests.lightning.small_runs import SmallRuns, all_strategies

pytestmark = pytest.mark.slow
# As in test_resume: between two saves, while a checkpoint is written, between end_task and the
# checkpoint after it, in the middle of the second task, while a row of the matrix is scored.
MOMENTS = [("step", 4), ("write", 2), ("ended", 1), ("step", 7), ("answers", 2)]


@pytest.fixture
def runs(tmp_path):
    return SmallRuns(tmp_path, kind="instruction")


@pytest.mark.parametrize("strategy", all_strategies("instruction"))
def test_a_run_killed_again_and_again_ends_as_one_that_was_left_alone(tmp_path, strategy):
    runs = SmallRuns(tmp_path, sizes=(20, 17), kind="instruction")
    runs.finish("alone", strategy)
    outputs = []
    for moment in MOMENTS:
        status, output = runs.start("killed", strategy, kill=moment)
        assert status == KILLED, (moment, output)
        outputs.append(output)
    outputs.append(runs.finish("killed", strategy))
    assert any("resuming" in output for output in outputs)
    assert runs.differences("killed", "alone") == []
    files = [file.name for file in (runs.path("alone") / "answers").rglob("*.jsonl")]
    assert len(files) == 2 + 2 * 2  # a row before training, and one after each task
    assert (runs.path("alone") / "lenient.json").is_file()


def remembered_files(folder):
    return {file.name: file.read_bytes() for file in (folder / "memory").rglob("rows_*.bin")}


def test_features_on_disk_are_enough_at_every_write(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12, 10), kind="instruction")
    strategy = {
        "class_path": "mmcl.strategies.FeatureReplay",
        "init_args": {"buffer_size": 4, "storage": "disk"},
    }
    words = runs.words("alone", strategy)
    assert in_process(snapshots_of, words, runs.path("alone"), tmp_path / "left") == 0
    assert remembered_files(runs.path("alone"))
    endings = (".bin", ".ckpt", "run.json")
    left = sorted(f for f in (tmp_path / "left").iterdir() if f.name.endswith(endings))
    assert len(left) > 10
    for folder in left:
        shutil.rmtree(runs.path("killed"), ignore_errors=True)
        shutil.copytree(folder, runs.path("killed"))
        runs.finish("killed", strategy)
        assert runs.differences("killed", "alone") == [], folder.name
        assert remembered_files(runs.path("killed")) == remembered_files(runs.path("alone"))


def test_changed_features_on_disk_are_refused_and_missing_ones_are_made_again(runs):
    assert runs.start("run", "FeatureReplay", ("step", 9))[0] == KILLED
    [file] = (runs.path("run") / "memory").rglob("rows_*.bin")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    status, output = runs.start("run", "FeatureReplay")
    assert status == 1
    assert f"stored rows were changed: {file}" in output
    assert "Traceback" not in output
    file.unlink()
    status, output = runs.start("run", "FeatureReplay")
    assert status == 0
    assert f"needs {file}, which is missing or damaged: trained again from the beginning" in output


def test_bad_samples_are_counted_and_named(tmp_path):
    members = coloured(30, name="atrain")
    long = "word " * 200
    bad = {
        "atrain003.json": b'{"conversations": [',
        "atrain007.json": dialogue("<image>\n<image>\nWhich?", "red"),
        "atrain011.json": dialogue(f"<image>\n{long}", "red"),
    }
    members = [(name, bad.get(name, content)) for name, content in members]
    members = [pair for pair in members if pair[0] != "atrain013.png"]
    runs = SmallRuns(tmp_path, sizes=(30, 12), kind="instruction", changes={"a_train": members})
    status, output = runs.start("strict")
    assert status == 1
    assert (
        "samples of task 'task-a' cannot be read, more than data.max_bad_fraction=0.01 of 30"
        in output
    )
    runs.finish("run", data__max_bad_fraction=0.5)
    errors = json.loads((runs.path("run") / "run.json").read_text())["errors"]
    errors = {error.partition(" in ")[0]: error for error in errors}
    assert set(errors) == {"atrain003", "atrain007", "atrain011", "atrain013"}
    assert "is not JSON" in errors["atrain003"]
    assert "shows 2 images and it has one" in errors["atrain007"]
    assert "tokens, and the model's max_length is 64: raise it" in errors["atrain011"]
    assert "shows 1 images and it has none" in errors["atrain013"]


def fail_on_one(words, output):
    """Run a command line on a model that cannot answer batches with a certain sample in them."""
    from mmcl.models.hf_vlm.model import ImageTextToText

    own = ImageTextToText.generate

    def failing(model, batch, *rest, **how):
        if "atest002" in batch.keys:
            raise RuntimeError("the image is too odd")
        return own(model, batch, *rest, **how)

    ImageTextToText.generate = failing
    command(words, output)


def test_a_sample_whose_answer_fails_is_empty_and_named(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(12,), kind="instruction")
    runs.finish("sound", data__max_bad_fraction=0.5)
    words, output = runs.words("failing", data__max_bad_fraction=0.5), tmp_path / "output"
    assert in_process(fail_on_one, words, output) == 0, output.read_text()
    errors = json.loads((runs.path("failing") / "run.json").read_text())["errors"]
    assert errors == ["atest002: no answer (the image is too odd)"]
    sound, failing = (
        read_predictions(predictions_path(runs.path(name), 1, 0)) for name in ("sound", "failing")
    )
    assert [a.text for a in failing if a.key == "atest002"] == [""]
    others = [[a for a in output if a.key != "atest002"] for output in (sound, failing)]
    assert others[0] == others[1]


def test_evaluate_scores_kept_checkpoints_again(runs):
    runs.finish("run", "LoRA")
    folder = runs.path("run")
    before = {file: file.read_bytes() for file in folder.rglob("*.json*")}
    output = folder.parent / "output"
    words = ["evaluate", str(folder), "--after_task", "1,3", "--tasks", "0-1"]
    assert in_process(command, words, output) == 0, output.read_text()
    assert before == {file: file.read_bytes() for file in before}
    again = folder / "evaluation"
    for name in ("matrix.json", "lenient.json"):
        first, second = (AccuracyMatrix.read(f / name).values for f in (folder, again))
        for row in (1, 3):
            assert second[row][:2] == first[row][:2]
        assert list(second[2]) == [None] * 3
    for row in (1, 3):
        path = predictions_path(again, row, 1)
        assert path.read_bytes() == predictions_path(folder, row, 1).read_bytes()


def test_samples_without_an_image_are_trained_and_answered_among_the_others(tmp_path):
    texts = {}
    for letter in "ab":
        members = coloured(16, name=f"{letter}train")
        bare = [f"{letter}train{number:03d}" for number in (1, 2, 6, 9)]
        bare_question = dialogue("Say red.", "red")
        members = [
            (name, bare_question if name.partition(".")[0] in bare else content)
            for name, content in members
            if not (name.endswith("png") and name.partition(".")[0] in bare)
        ]
        texts[f"{letter}_train"] = members
    runs = SmallRuns(tmp_path, sizes=(16, 16), kind="instruction", changes=texts)
    for strategy in ("Finetune", "ExperienceReplay", "FeatureReplay", "L2P"):
        runs.finish(strategy, strategy)
        errors = json.loads((runs.path(strategy) / "run.json").read_text())["errors"]
        assert errors == []


@pytest.mark.parametrize("strategy", ["DarkReplay", "NCM", "RanPAC"])
def test_what_needs_class_scores_is_refused_before_anything_runs(runs, strategy):
    status, output = runs.start("run", strategy)
    assert status == 1
    assert f"{strategy} needs class scores, and TinyLlava generates text: use" in output
    assert "Traceback" not in output
    assert not (runs.path("run") / "run.json").exists()


def test_words_of_a_run_are_the_dropouts_of_its_seed(runs):
    strategy = {
        "class_path": "mmcl.strategies.LoRA", "init_args": {"rank": 2, "dropout": 0.5},
    }  # fmt: skip
    runs.finish("alone", strategy)
    assert runs.start("killed", strategy, ("step", 5))[0] == KILLED
    runs.finish("killed", strategy)
    assert runs.differences("killed", "alone") == []
