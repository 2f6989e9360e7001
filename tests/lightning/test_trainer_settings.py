"""Every argument of Lightning's Trainer is obeyed by a run, or refused by its name."""

import inspect
import json
import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.plugins.io import AsyncCheckpointIO

from mmcl.cli import main, train
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.config.trainer_settings import (
    TRAINER_ARGUMENTS,
    check_trainer_settings,
    planned_steps,
)
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.optimization.lr_schedules import LRSchedule
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.task_callback import TaskCallback
from tests.behaviour.kill_runs import KILLED
from tests.distributed.ranks import on_ranks
from tests.lightning.small_runs import SmallRuns

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
STOP_AT_ONCE = [
    {
        "class_path": "pytorch_lightning.callbacks.EarlyStopping",
        "init_args": {"monitor": "val/loss", "stopping_threshold": 1000.0},
    }
]
SGD = {"model__optimizer": "torch.optim.SGD", "model__optimizer.lr": 1.0}


class Watched:
    """Runs of one task of 20 samples in this process, 3 global batches an epoch; what they did."""

    def __init__(self, folder):
        self.runs = SmallRuns(folder, sizes=(20,))
        self.batches, self.rates = [], []

    def __call__(self, name="run", strategy="Finetune", **settings):
        """Run a command line to its end; forget what earlier ones did."""
        self.batches.clear()
        self.rates.clear()
        options = {key: json.dumps(v) if isinstance(v, list) else v for key, v in settings.items()}
        return main(self.runs.words(name, strategy, **options))

    @property
    def keys(self):
        """The keys of every micro-batch, in order of training."""
        return [sorted(keys) for keys in self.batches]

    def ledger(self, name="run"):
        """The cost of the task."""
        return json.loads((self.runs.path(name) / "ledger.json").read_text())["tasks"][0]

    def warnings(self, name="run"):
        """The warnings of the run."""
        return json.loads((self.runs.path(name) / "run.json").read_text())["warnings"]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda folder: folder / "report.html")
    found = Watched(tmp_path)
    batch_end, before_step = TaskCallback.on_train_batch_end, TaskCallback.on_before_optimizer_step

    def note_batch(hooks, trainer, module, outputs, batch, batch_idx):
        found.batches.append(batch.keys)
        batch_end(hooks, trainer, module, outputs, batch, batch_idx)

    def note_rate(hooks, trainer, module, optimizer):
        before_step(hooks, trainer, module, optimizer)
        found.rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(TaskCallback, "on_train_batch_end", note_batch)
    monkeypatch.setattr(TaskCallback, "on_before_optimizer_step", note_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield found


def parsed(folder, **settings):
    """The command line's parser with a configuration."""
    words = SmallRuns(folder, sizes=(20,)).words("run", **settings)
    return ContinualCLI(words, program="test")


def test_the_table_names_every_argument_of_lightnings_trainer():
    assert list(TRAINER_ARGUMENTS) == list(dict.fromkeys(TRAINER_ARGUMENTS))
    assert set(TRAINER_ARGUMENTS) == set(inspect.signature(pl.Trainer).parameters)


def test_the_page_on_trainer_settings_has_a_row_for_every_argument():
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    stated = {row[1].strip(" `"): row[2].strip() for row in rows}
    assert set(stated) == set(TRAINER_ARGUMENTS)
    for name, rule in TRAINER_ARGUMENTS.items():
        assert rule.meaning in stated[name]
        assert stated[name].startswith("refused: ") == (not rule.meaning)
        assert ("refused without" in stated[name]) == rule.needs_validation


def test_lightnings_own_defaults_are_accepted():
    parameters = inspect.signature(pl.Trainer).parameters.values()
    check_trainer_settings({p.name: p.default for p in parameters}, has_validation=False)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("limit_test_batches", 2, "data.max_samples"),
        ("limit_predict_batches", 0.5, "`mmcl predict`"),
        ("enable_checkpointing", True, "checkpoint_every_n_steps"),
        ("enable_checkpointing", False, "checkpoint_every_n_steps"),
        ("default_root_dir", "elsewhere", "output_dir"),
        ("model_registry", "name", "`mmcl export`"),
        ("limit_val_batches", 2, "data.validation_share"),
        ("val_check_interval", 2, "data.validation_share"),
        ("val_check_interval", 1, "data.validation_share"),
        ("check_val_every_n_epoch", 2, "data.validation_share"),
        ("num_sanity_val_steps", 2, "data.validation_share"),
        ("max_epochs", 0, "give 1 or more"),
        ("max_steps", 0, "give 1 or more"),
        ("limit_train_batches", 0.0, "give 1 or more"),
        ("max_epochs", -1, "trainer.max_steps or trainer.max_time"),
        ("plugins", [AsyncCheckpointIO()], "leave it out"),
    ],
)
def test_a_setting_that_a_run_cannot_obey_is_refused_by_its_name(name, value, instead):
    with pytest.raises(ValueError, match=rf"trainer\.{name} ") as caught:
        check_trainer_settings({"max_epochs": 1, name: value}, has_validation=False)
    assert instead in str(caught.value)


def test_all_refused_settings_are_named_at_once():
    with pytest.raises(ValueError, match=r"model_registry.*; trainer\.max_steps is 0"):
        check_trainer_settings({"model_registry": "x", "max_steps": 0}, has_validation=False)


@pytest.mark.parametrize("value", [2, 0.5, 1])
def test_settings_of_validation_are_accepted_with_a_validation_part(value):
    for name in ("limit_val_batches", "val_check_interval", "num_sanity_val_steps"):
        check_trainer_settings({name: value}, has_validation=True)


def test_validation_by_the_clock_is_refused_because_a_resumed_run_would_differ():
    with pytest.raises(ValueError, match=r"val_check_interval is a time.*number of batches"):
        check_trainer_settings({"val_check_interval": "00:00:01:00"}, has_validation=True)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "64"])
def test_a_true_precision_is_refused_by_the_mixed_one(tmp_path, precision):
    cli = parsed(tmp_path, trainer__precision=precision)
    with pytest.raises(ValueError, match=r"trainer\.precision is '.*-true'.*use 'bf16-mixed'"):
        cli.make_trainer(callbacks=[])


INT_OR_FLOAT = (
    "limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
    "overfit_batches", "val_check_interval",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [*(f"trainer__{each}" for each in INT_OR_FLOAT), "data__max_samples"]
)
def test_one_is_a_number_and_1_0_is_a_fraction(tmp_path, name):
    group, key = name.split("__")
    runs = SmallRuns(tmp_path, sizes=(20,))
    for text, kind in (("1", int), ("1.0", float), ("0.5", float)):
        cli = ContinualCLI(runs.words("run", **{name: text}), program="test")
        assert type(cli.config[group][key]) is kind
        assert type(yaml.safe_load(yaml.safe_dump(cli.plain()))[group][key]) is kind
    hints = {action.dest: str(getattr(action, "_typehint", "")) for action in cli.parser._actions}
    assert hints[f"{group}.{key}"].startswith("int | float")


def test_a_run_without_a_newer_setting_resumes_while_that_is_off(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.check_config({"data": {"stream": "x"}})
    (tmp_path / "run.json").write_text("{}")
    folder.check_config({"data": {"stream": "x", "validation_share": 0.0}, "keep_best": None})
    with pytest.raises(ValueError, match=r"data\.validation_share is None there and 0\.1 here"):
        folder.check_config({"data": {"stream": "x", "validation_share": 0.1}})


def test_one_sample_is_not_all_of_them(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20,), test_size=4)
    sizes = [
        ContinualDataModule(str(runs.card), max_samples=n).stream[0].size for n in (1, 1.0, 64.0)
    ]
    assert sizes == [1, 20, 20]


def test_micro_batches_are_those_of_the_setting_or_of_the_largest_size(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20,))
    data = ContinualDataModule(str(runs.card), global_batch_size=16, micro_batch_size=3)
    assert [data.accumulate_grad_batches(world) for world in (1, 2, 6)] == [6, 3, 1]
    assert data.accumulate_grad_batches(1, configured=8) == 8
    with pytest.raises(ValueError, match=r"is 4, and data\.micro_batch_size 3 needs 6: set one"):
        data.accumulate_grad_batches(1, configured=4)


@pytest.mark.parametrize(
    ("batches", "parts", "epochs", "max_steps", "full", "planned"),
    [
        (6, 1, 2, -1, 12, 12), (6, 2, 2, -1, 6, 6), (6, 2, 2, 4, 6, 4), (6, 2, 2, 9, 6, 6),
        (6, 1, -1, 9, 0, 9), (6, 1, -1, -1, 0, 0), (1, 3, 1, -1, 1, 1),
    ],
)  # fmt: skip
def test_the_steps_of_a_task_are_known_beforehand(batches, parts, epochs, max_steps, full, planned):
    trainer = SimpleNamespace(
        num_training_batches=batches, accumulate_grad_batches=parts, max_epochs=epochs,
        max_steps=max_steps,
    )  # fmt: skip
    assert planned_steps(trainer) == (full, planned)


def test_a_closed_form_takes_one_step_in_any_number_of_micro_batches(watched):
    settings = {"data__micro_batch_size": 3, "checkpoint_every_n_steps": 1}
    assert watched("run", "RanPAC", **settings) == 0
    assert len(watched.batches) == 1
    assert watched.warnings() == []


def test_fit_takes_micro_batches_and_global_batches_as_a_run_does(watched, monkeypatch):
    sizes, training_step = [], ContinualModule.training_step

    def note(module, batch, batch_idx):
        sizes.append(len(batch))
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(ContinualModule, "training_step", note)
    monkeypatch.chdir(watched.runs.folder)
    settings = {"data__micro_batch_size": 3, "trainer__limit_train_batches": 2}
    words = watched.runs.words("run", trainer__max_epochs=1, **settings)
    words = [word for word in words if word not in ("--output_dir", "--run_name", "run")]
    assert main(["fit", *words[:2], *words[3:]]) == 0
    assert sizes == [2, 2, 2, 3, 2, 2]


def weights(run, name="run"):
    """All weights after the task as one vector."""
    state = run.runs.kept(name)
    return torch.cat([v.flatten().double() for v in state.values() if isinstance(v, torch.Tensor)])


def test_accumulated_micro_batches_are_the_same_global_batches(watched, capsys):
    plain = {**SGD, "model__optimizer.lr": 0.1, "trainer__max_epochs": 1}
    assert watched("whole", **plain) == 0
    whole = watched.keys
    assert watched("parts", trainer__accumulate_grad_batches=3, **plain) == 0
    assert [len(keys) for keys in watched.batches] == [2, 2, 2, 3, 2, 2, 3, 2, 2]
    parts = watched.keys
    assert [sorted(sum(parts[i : i + 3], [])) for i in (0, 3, 6)] == whole
    assert watched.ledger("parts")["steps"] == 3
    torch.testing.assert_close(
        weights(watched, "parts"), weights(watched, "whole"), rtol=0, atol=1e-5
    )
    assert "trainer.accumulate_grad_batches is 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "norm"), [("norm", lambda d: d.norm()), ("value", lambda d: d.abs().max())]
)
def test_gradients_are_clipped(watched, algorithm, norm):
    # One step of SGD at rate 1 moves the weights by the clipped gradient.
    one = {**SGD, "trainer__max_steps": 1, "model__warmup_steps": 0}
    assert watched("still", **{**one, "model__optimizer.lr": 0.0}) == 0
    clip = {"trainer__gradient_clip_val": 1e-3, "trainer__gradient_clip_algorithm": algorithm}
    assert watched("clipped", **one, **clip) == 0
    moved = weights(watched, "clipped") - weights(watched, "still")
    assert float(norm(moved)) == pytest.approx(1e-3, rel=1e-3)


def test_a_number_of_batches_limits_every_epoch_and_a_fraction_rounds_down(watched):
    assert watched("one", trainer__limit_train_batches=1) == 0
    assert watched.ledger("one")["steps"] == 2  # two epochs
    assert watched.ledger("one")["samples_new"] == 12  # batches of 6, 7 and 7
    assert watched("some", trainer__limit_train_batches=0.7, data__micro_batch_size=4) == 0
    assert watched.ledger("some")["steps"] == 4
    assert len(watched.batches) == 8  # two micro-batches each


def test_overfit_batches_are_the_same_in_every_epoch(watched):
    assert watched("run", trainer__overfit_batches=2, trainer__max_epochs=3) == 0
    first, second, *others = watched.keys
    assert others == [first, second] * 2
    assert first != second


def test_a_task_that_max_steps_ends_is_finished_and_named(watched):
    assert watched("run", "EWC", trainer__max_steps=4, model__warmup_steps=0) == 0
    assert watched.ledger()["steps"] == 4
    assert watched.ledger()["samples_new"] == 26  # an epoch of 20, and a batch of 6
    sentence = "task 'task-a' was ended by trainer.max_steps 4 after 4 of 6 steps"
    assert sentence in watched.warnings()
    # The cosine ends with the true last step, and end_task was called: EWC has its table.
    expected = [3e-3 * LRSchedule("cosine").factor(s, 4) for s in range(4)]
    assert watched.rates == pytest.approx(expected)
    found = watched.runs.kept("run")["strategy.importance._extra_state"]["tensors"]
    assert any(float(values.abs().max()) > 0 for values in found.values())


def test_without_a_number_of_epochs_max_steps_is_the_length_of_a_task(watched):
    settings = {"trainer__max_epochs": -1, "trainer__max_steps": 5}
    assert watched("run", **settings) == 0
    assert (watched.ledger()["steps"], watched.warnings()) == (5, [])


def test_a_schedule_without_a_known_end_is_refused(watched, capsys):
    settings = {"trainer__max_epochs": -1, "trainer__max_time": "00:00:10:00"}
    assert watched("run", **settings) == 1
    assert "lr_schedule is 'cosine' and trainer.max_epochs -1" in capsys.readouterr().err


def test_a_task_without_time_left_takes_a_step_and_is_finished(watched):
    assert watched("run", trainer__max_time="00:00:00:00") == 0
    assert watched.ledger()["steps"] == 1
    assert watched.warnings() == ["task 'task-a' was ended by trainer.max_time after 1 of 6 steps"]


@pytest.mark.slow
@pytest.mark.parametrize("least", [{"trainer__min_epochs": 2}, {"trainer__min_steps": 5}, {}])
def test_a_callback_stops_a_task_after_its_least_length(watched, least):
    settings = {"trainer__callbacks": STOP_AT_ONCE, "trainer__max_epochs": 3, **least}
    assert watched("run", data__validation_share=0.2, **settings) == 0  # 2 batches an epoch
    steps = {"trainer__min_epochs": 4, "trainer__min_steps": 5, "": 2}[next(iter(least), "")]
    assert watched.ledger()["steps"] == steps
    found = f"task 'task-a' was ended by EarlyStopping on val/loss after {steps} of 6 steps"
    assert found in watched.warnings()


def test_a_fast_dev_run_takes_a_batch_and_keeps_nothing(watched, capsys):
    assert watched("run", trainer__fast_dev_run=1, data__validation_share=0.2) == 0
    assert len(watched.batches) == 1
    assert list((watched.runs.folder / "runs").iterdir()) == []
    assert "fast_dev_run: everything ran on 1 batches" in capsys.readouterr().out


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profile_is_a_file_of_the_run(watched, profiler):
    assert watched("run", trainer__profiler=profiler, trainer__max_epochs=1) == 0
    report = watched.runs.path("run") / "profiles" / "fit-profile.txt"
    assert "run_training_epoch" in report.read_text()


SAME_BITS = [
    {"trainer__detect_anomaly": "true"}, {"trainer__deterministic": "true"},
    {"trainer__benchmark": "true"}, {"trainer__inference_mode": "false"},
    {"trainer__barebones": "true"}, {"trainer__sync_batchnorm": "true"},
    {"trainer__reload_dataloaders_every_n_epochs": 1}, {"trainer__min_epochs": 1},
    {"trainer__log_every_n_steps": 1, "trainer__logger": "false"},
    {"trainer__use_distributed_sampler": "false"}, {"trainer__enable_autolog_hparams": "false"},
    {"trainer__enable_model_summary": "true"}, {"trainer__enable_progress_bar": "false"},
    {"trainer__devices": 1, "trainer__num_nodes": 1, "trainer__strategy": "auto"},
    {"trainer__precision": "32-true"},
    {"trainer__plugins": ["pytorch_lightning.plugins.io.TorchCheckpointIO"]},
    {"trainer__callbacks": [{"class_path": "pytorch_lightning.callbacks.TQDMProgressBar"}]},
]  # fmt: skip


@pytest.mark.slow
def test_settings_of_another_purpose_change_no_bit(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    runs.finish("plain", "ExperienceReplay")
    for number, settings in enumerate(SAME_BITS):
        texts = {k: json.dumps(v) if isinstance(v, list) else v for k, v in settings.items()}
        runs.finish(f"run{number}", "ExperienceReplay", **texts)
        assert runs.differences(f"run{number}", "plain") == [], settings


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16"])
def test_mixed_precision_changes_bits_and_keeps_weights_in_float32(tmp_path, precision):
    runs = SmallRuns(tmp_path, sizes=(20,))
    runs.finish("plain")
    output = runs.finish("mixed", trainer__precision=precision)
    assert runs.differences("mixed", "plain") != []
    assert all(v.dtype != torch.bfloat16 for v in runs.kept("mixed").values())
    assert ("fp16 is not supported on CPU" in output) == (precision == "16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"trainer__max_steps": 5, "trainer__max_epochs": -1},
        {"trainer__overfit_batches": 2, "trainer__max_epochs": 3},
        {"trainer__accumulate_grad_batches": 2, "trainer__limit_train_batches": 2},
        {"trainer__reload_dataloaders_every_n_epochs": 1, "trainer__limit_train_batches": 0.7},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_killed_run_resumes_exactly_with(tmp_path, settings):
    runs = SmallRuns(tmp_path, sizes=(20, 17))
    runs.finish("alone", "ExperienceReplay", **settings)
    parts = settings.get("trainer__accumulate_grad_batches", 1)
    for step in (2 * parts + 1, 4 * parts, 3 * parts):
        started = runs.start("killed", "ExperienceReplay", ("step", step), **settings)
        assert started[0] == KILLED, started[1]
    runs.finish("killed", "ExperienceReplay", **settings)
    assert runs.differences("killed", "alone") == []


@pytest.mark.slow
def test_a_resumed_task_whose_time_ran_out_is_finished(tmp_path):
    # The pauses are longer than the time that is left after the first start.
    runs = SmallRuns(tmp_path, sizes=(20,))
    settings = {"trainer__max_time": "00:00:00:02", "trainer__max_epochs": 400}
    status, output = runs.start("run", kill=("ending", 1), checkpoint_every_n_steps=1, **settings)
    assert status == KILLED, output
    output = runs.finish("run", checkpoint_every_n_steps=1, **settings)
    assert "task 'task-a' was ended by trainer.max_time after" in output


@pytest.mark.slow
def test_a_run_resumes_on_two_devices_with_half_the_micro_batches(tmp_path):
    runs = SmallRuns(tmp_path, sizes=(24, 21))
    settings = {**SGD, "model__optimizer.lr": 0.1, "data__micro_batch_size": 2}
    alone, moved = (runs.words(name, "Finetune", **settings) for name in ("alone", "moved"))
    assert on_ranks(alone, tmp_path / "alone", world=1) == [0]
    for step in (2, 5):  # of 4 micro-batches; the second one after the end of an epoch
        shutil.rmtree(runs.path("moved"), ignore_errors=True)
        kill = ("step", 4 * step)
        every = ["--checkpoint_every_n_steps=1"]
        assert on_ranks([*moved, *every], tmp_path / "killed", kill, world=1) == [KILLED]
        assert on_ranks([*moved, *every], tmp_path / "moved") == [0, 0]
        costs = [
            json.loads((runs.path(name) / "ledger.json").read_text())["tasks"]
            for name in ("alone", "moved")
        ]
        for one, two in zip(*costs, strict=True):
            assert (one["steps"], one["samples_new"]) == (two["steps"], two["samples_new"])
        left, right = runs.kept("alone"), runs.kept("moved")
        for key in left:
            torch.testing.assert_close(left[key], right[key], rtol=0, atol=1e-4)


def test_a_callback_cannot_monitor_what_is_not_measured(watched, capsys):
    stop = [{**STOP_AT_ONCE[0], "init_args": {"monitor": "val/acc"}}]
    assert watched("run", trainer__callbacks=stop, data__validation_share=0.2) == 1
    found = "EarlyStopping monitors 'val/acc', and the validation of this task logs val/loss and"
    assert f"{found} val/accuracy: monitor one of them" in capsys.readouterr().err
    assert watched("other", trainer__callbacks=STOP_AT_ONCE) == 1
    found = "EarlyStopping monitors 'val/loss', and there is no validation part"
    assert found in capsys.readouterr().err


def test_a_model_checkpoint_writes_beside_the_runs_own(watched, capsys):
    path = "pytorch_lightning.callbacks.ModelCheckpoint"
    monitor = {"monitor": "val/accuracy", "mode": "max"}
    best = [{"class_path": path, "init_args": monitor}]
    assert watched("run", trainer__callbacks=best, data__validation_share=0.2) == 0
    own = watched.runs.path("run") / "checkpoints"
    assert len(list((own / "task_00").glob("epoch=*.ckpt"))) == 1
    assert [file.name for file in own.glob("*.ckpt")] == ["task_00.ckpt"]
    taken = str(watched.runs.path("mixed") / "checkpoints")
    best = [{"class_path": path, "init_args": {**monitor, "dirpath": taken}}]
    assert watched("mixed", trainer__callbacks=best, data__validation_share=0.2) == 1
    assert "where the run's own checkpoints are: leave dirpath out" in capsys.readouterr().err


def test_loaders_see_every_global_batch_once(watched):
    assert watched("run") == 0
    epochs = [sum(watched.keys[start : start + 3], []) for start in (0, 3)]
    assert [len(set(keys)) for keys in epochs] == [20, 20]
    assert all(left != right for left, right in pairwise(watched.keys))
