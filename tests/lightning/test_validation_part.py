"""The validation part of a task: which samples it holds, what is measured on it, what is kept."""

import json
import re
import warnings

import pytest
import torch

from mmcl.cli import main, train
from mmcl.core import Batch, TaskStream
from mmcl.data import open_stream
from mmcl.data.decode import decode_image
from mmcl.data.shards.reader import validation_size
from mmcl.lightning.checkpoints.checkpoint_io import BestWeights
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.task_callback import TaskCallback
from mmcl.models import OpenCLIP
from tests.behaviour.kill_runs import KILLED
from tests.data.small_stream import write_stream
from tests.distributed.ranks import on_ranks, seen
from tests.lightning.small_runs import SmallRuns, same, small_model

PATIENT = [
    {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss", "patience": 2},
    },
    {
        "class_path": "pytorch_lightning.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "val/accuracy", "mode": "max"},
    },
]


def keys_of(prepared, task, split):
    reader = prepared.reader(task, split)
    return [reader.key(number) for number in range(len(reader))]


@pytest.mark.parametrize("max_samples", [None, 12])
def test_a_sample_is_either_trained_on_or_held_out(tmp_path, max_samples):
    stream = write_stream(tmp_path, (20, 11))
    whole = open_stream(stream, max_samples=max_samples)
    parted = open_stream(stream, max_samples=max_samples, validation_share=0.25)
    for task, size in enumerate((20, 11) if max_samples is None else (12, 11)):
        held_out, kept = (keys_of(parted, task, split) for split in ("validation", "train"))
        assert len(held_out) == round(0.25 * size)
        assert sorted(held_out + kept) == sorted(keys_of(whole, task, "train"))
        assert parted.stream[task].size == len(kept) == size - len(held_out)
        assert keys_of(parted, task, "test") == keys_of(whole, task, "test")


def test_the_part_depends_on_the_seed_and_the_tasks_name_alone(tmp_path):
    stream = write_stream(tmp_path, (20, 20))
    parts = [
        keys_of(open_stream(stream, validation_share=0.3, seed=seed), 0, "validation")
        for seed in (0, 0, 1)
    ]
    assert parts[0] == parts[1] != parts[2]
    turned = TaskStream.read(tmp_path / "small.yaml", order=[1, 0])
    assert keys_of(open_stream(turned, validation_share=0.3), 1, "validation") == parts[0]


def test_at_least_one_sample_is_on_either_side():
    assert [validation_size(10, share) for share in (0, 0.01, 0.25, 0.99)] == [0, 1, 2, 9]


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_outside_of_zero_to_one_is_refused(tmp_path, share):
    stream = write_stream(tmp_path, (4,))
    with pytest.raises(ValueError, match="expected a fraction from 0 to less than 1"):
        open_stream(stream, validation_share=share)


def test_one_sample_cannot_be_on_both_sides(tmp_path):
    with pytest.raises(ValueError, match="'task-a' has 1 training samples"):
        open_stream(write_stream(tmp_path, (1,)), validation_share=0.1)


class Validated:
    """Runs in this process, with what was trained on and what every validation found."""

    def __init__(self, folder):
        self.runs = SmallRuns(folder, sizes=(20, 16))
        self.trained, self.passed, self.found = set(), set(), []

    def __call__(self, name="run", strategy="ExperienceReplay", **settings):
        """Run a command line to its end."""
        for noted in (self.trained, self.passed, self.found):
            noted.clear()
        options = {key: json.dumps(v) if isinstance(v, list) else v for key, v in settings.items()}
        return main(self.runs.words(name, strategy, **options))


@pytest.fixture
def validated(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda folder: folder / "report.html")
    found = Validated(tmp_path)
    batch_end, pass_of = TaskCallback.on_train_batch_end, TaskCallback._pass
    validation_end = TaskCallback.on_validation_end

    def note_batch(hooks, trainer, module, outputs, batch, batch_idx):
        found.trained |= set(batch.keys)
        batch_end(hooks, trainer, module, outputs, batch, batch_idx)

    def note_pass(hooks, trainer, module):
        batches = list(pass_of(hooks, trainer, module))
        found.passed |= {key for batch in batches for key in batch.keys}
        return batches

    def note_validation(hooks, trainer, module):
        state = {name: v.clone() for name, v in module.state_dict().items() if torch.is_tensor(v)}
        found.found.append((hooks.task.index, dict(module.validation), state))
        validation_end(hooks, trainer, module)

    monkeypatch.setattr(TaskCallback, "on_train_batch_end", note_batch)
    monkeypatch.setattr(TaskCallback, "_pass", note_pass)
    monkeypatch.setattr(TaskCallback, "on_validation_end", note_validation)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield found


def held_out(runs, share=0.25):
    """The held-out keys of every task, by task."""
    prepared = open_stream(TaskStream.read(runs.card), validation_share=share)
    return [set(keys_of(prepared, task, "validation")) for task in range(2)]


def test_a_held_out_sample_is_never_trained_on_replayed_or_passed_over(validated):
    settings = {"data__validation_share": 0.25, "trainer__max_epochs": 3}
    assert validated(**settings) == 0
    parts = held_out(validated.runs)
    assert [len(part) for part in parts] == [5, 4]
    for part in parts:
        assert not part & validated.trained
        assert not part & validated.passed
    assert len(validated.trained) == len(validated.passed) == 15 + 12


def test_the_loss_and_the_score_are_those_of_the_held_out_samples_one_by_one(validated):
    settings = {"data__validation_share": 0.25, "data__eval_batch_size": 2}
    assert validated(strategy="Finetune", **settings) == 0
    prepared = open_stream(TaskStream.read(validated.runs.card), validation_share=0.25)
    model = OpenCLIP(small_model(validated.runs.folder))
    transform = model.transform(False)
    for task, (of_task, metrics, state) in enumerate(validated.found[1::2]):  # of two epochs
        assert of_task == task
        weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        model.load_state_dict(weights, strict=False)
        model.eval()
        names = prepared.stream.classes_seen(task)
        model.set_classes(names, prepared.stream[task].templates)
        losses, hits = [], []
        reader = prepared.reader(task, "validation")
        for number in range(len(reader)):
            sample = reader.read(number)
            label = int(sample.members["cls"])
            image = transform(decode_image(sample.members["png"]), None, 0).image
            with torch.no_grad():
                logits = model(Batch.from_images(image[None], [label])).logits[0].double()
            losses.append(float(logits.logsumexp(0) - logits[label]))
            hits.append(float(logits.argmax() == label))
        assert metrics["val/loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert metrics["val/accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_validation_changes_no_bit_of_training(validated):
    settings = {"data__validation_share": 0.25}
    assert validated("measured", **settings, trainer__val_check_interval=1) == 0
    assert len(validated.found) == 2 * 2 + 2 * 3  # after every step
    assert validated("unmeasured", **settings, trainer__limit_val_batches=0) == 0
    assert validated.found == []
    assert validated.runs.differences("measured", "unmeasured") == []


@pytest.mark.parametrize("measure", ["loss", "score"])
def test_a_task_ends_with_the_weights_of_its_best_validation(validated, measure):
    settings = {
        "data__validation_share": 0.25, "model__learning_rate": 0.03, "trainer__max_epochs": 4,
    }  # fmt: skip
    assert validated("run", "Finetune", keep_best=measure, **settings) == 0
    first = [(metrics, state) for task, metrics, state in validated.found if task == 0]
    assert len(first) == 4
    name, sign = ("val/loss", -1) if measure == "loss" else ("val/accuracy", 1)
    best = max(range(4), key=lambda epoch: (sign * first[epoch][0][name], -epoch))
    kept = validated.runs.kept("run", task=0)
    kept = {k: v for k, v in kept.items() if torch.is_tensor(v) and "task_progress" not in k}
    assert all(same(kept[key], first[best][1][key]) for key in kept)
    assert best == 3 or not all(same(kept[key], first[3][1][key]) for key in kept)


def test_what_is_not_better_is_not_kept_and_a_score_rises(tmp_path):
    module = ContinualModule(OpenCLIP(small_model(tmp_path)))
    for measure, values, best in (("loss", (3.0, 1.0, 1.0, 2.0), 1), ("score", (0.1, 0.5, 0.5), 1)):
        name = {"loss": "val/loss", "score": "val/accuracy"}[measure]
        kept = BestWeights(measure)
        for step, value in enumerate(values):
            other = "val/loss" if measure == "score" else "val/accuracy"
            kept.update({name: value, other: 9.0}, module, step)
        assert (kept.state["value"], kept.state["step"]) == (values[best], best)


def test_best_weights_without_a_validation_part_are_refused(validated, capsys):
    assert validated(keep_best="loss") == 1
    assert "keep_best is 'loss' and there is no validation part" in capsys.readouterr().err


def test_a_task_that_ends_before_its_first_validation_says_so(validated):
    settings = {"keep_best": "loss", "trainer__check_val_every_n_epoch": 5}
    assert validated(data__validation_share=0.25, **settings) == 0
    found = json.loads((validated.runs.path("run") / "run.json").read_text())["warnings"]
    assert "task 'task-a' ended before a validation: no best weights" in found


def test_fit_validates_on_the_part_and_validate_names_what_it_used(validated, capsys, monkeypatch):
    monkeypatch.chdir(validated.runs.folder)
    words = validated.runs.words("run")
    words = [*words[:2], "--trainer.num_sanity_val_steps=0"]
    with_part = [*words, "--data.validation_share=0.25"]
    assert main(["fit", *with_part, f"--trainer.callbacks={json.dumps(PATIENT[:1])}"]) == 0
    assert "no logger configured" not in capsys.readouterr().err
    assert main(["fit", *words]) == 0
    assert "val/" not in capsys.readouterr().out
    assert main(["validate", *with_part]) == 0
    out = capsys.readouterr().out
    assert "validated on the validation part of task 'task-a'" in out
    assert "val/loss" in out
    assert "val/accuracy" in out
    assert main(["validate", *words]) == 0
    out = capsys.readouterr().out
    assert "validated on the test split of task 'task-a'; data.validation_share" in out
    assert "accuracy/task-a" in out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioning", "instruction"])
def test_captions_and_answers_are_validated(tmp_path, kind):
    runs = SmallRuns(tmp_path, sizes=(20, 16), kind=kind)
    output = runs.finish("run", data__validation_share=0.25)
    score = {"captioning": "recall@1", "instruction": "exact"}[kind]
    assert re.search(rf"'task-b' ends with val/loss \d+\.\d+, val/{score} \d\.\d+", output)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"keep_best": "loss", "trainer__callbacks": json.dumps(PATIENT), "trainer__max_epochs": 4},
        {"keep_best": "score", "trainer__val_check_interval": 2, "trainer__max_epochs": 3},
        {"keep_best": "loss", "trainer__max_steps": 5, "trainer__max_epochs": 3},
        {"keep_best": "score", "trainer__accumulate_grad_batches": 2},
    ],
    ids=["early_stopping", "interval", "max_steps", "accumulation"],
)
def test_a_killed_run_ends_with_the_same_best_weights(tmp_path, settings):
    settings = {**settings, "data__validation_share": 0.25, "model__learning_rate": 0.03}
    runs = SmallRuns(tmp_path, sizes=(24, 21))
    runs.finish("alone", "ExperienceReplay", **settings)
    parts = settings.get("trainer__accumulate_grad_batches", 1)
    every = {"checkpoint_every_n_steps": 1}
    # At the end of an epoch, behind it, in the next one; each start resumes from the one before.
    for step in (3 * parts, 2 * parts, 3 * parts):
        status, output = runs.start(
            "killed", "ExperienceReplay", ("step", step), **every, **settings
        )
        assert status == KILLED, output
    runs.finish("killed", "ExperienceReplay", **every, **settings)
    assert runs.differences("killed", "alone") == []


@pytest.mark.slow
def test_two_processes_measure_and_keep_what_one_does(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(24, 21))
    found = []
    for name, world in (("one", 1), ("two", 2)):
        words = runs.words(
            name, "Finetune", data__validation_share=0.25, keep_best="loss",
            model__optimizer="torch.optim.SGD", **{"model__optimizer.lr": 0.1},
        )  # fmt: skip
        assert on_ranks(words, tmp_path / name, world=world) == [0] * world
        output = (tmp_path / name / "output_0").read_text()
        found.append(re.findall(r"ends with the weights of step \d+", output))
    assert found[0] == found[1]
    assert len(found[0]) == 2
    one, two = (seen(tmp_path / name)["states"][-1] for name in ("one", "two"))
    for key, value in one.items():
        if torch.is_tensor(value) and value.is_floating_point():
            torch.testing.assert_close(two[key], value, rtol=0, atol=1e-3)
