"""Runs with loggers, left alone and killed: one log, continuous steps, every score."""

import csv
import json
from functools import partial

import pytest

from mmcl.lightning.optimization.lr_schedules import LRSchedule
from tests.behaviour.kill_runs import KILLED
from tests.lightning.small_runs import SmallRuns
from tests.toys import toy_wandb

pytestmark = pytest.mark.slow
SIZES = (9, 8, 4)
BETWEEN = [
    ("ending", 1), ("ended", 1), ("written", 3), ("ledger", 1), ("state", 2), ("score", 1),
    ("matrix", 1), ("written", 4), ("step", 2), ("ended", 1), ("written", 6),
]  # fmt: skip


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Runs of three tasks, one of which was left alone with the logger "true"."""
    runs = SmallRuns(tmp_path_factory.mktemp("runs"), SIZES)
    runs.finish("alone", strategy(), **options("true"))
    return runs


def strategy():
    """Replay and a penalty."""
    members = [
        {"class_path": "mmcl.strategies.EWC", "init_args": {"ewc_lambda": 10.0}},
        {"class_path": "mmcl.strategies.ExperienceReplay", "init_args": {"buffer_size": 12}},
    ]
    return {"class_path": "mmcl.strategies.Chain", "init_args": {"strategies": members}}


def options(logger, **more):
    return {"trainer__logger": logger, "trainer__log_every_n_steps": 1, **more}


def lines(runs, name):
    with (runs.path(name) / "logs" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in line.items() if v} for line in csv.DictReader(file)]


def killed_and_finished(runs, name, moments, **changes):
    for moment in moments:
        status, output = runs.start(name, strategy(), moment, **changes)
        assert status == KILLED, (moment, output)
    runs.finish(name, strategy(), **changes)


def test_one_csv_file_has_every_step_and_every_row(logged):
    trained = [line for line in lines(logged, "alone") if "train/loss" in line]
    scored = [line for line in lines(logged, "alone") if "score/task-a" in line]
    total = len(trained)
    assert [int(line["step"]) for line in trained] == list(range(1, total + 1))
    for line in trained:
        terms = [float(v) for k, v in line.items() if k.startswith("train/") and k != "train/loss"]
        assert sum(terms) == pytest.approx(float(line["train/loss"]), rel=1e-5)
    # The penalty has its own column, from the second task on or in all of them.
    assert "train/ewc" in trained[-1]
    ends = [int(line["step"]) for line in scored]
    assert ends[0] == 0
    assert ends[-1] == total
    rates = [0.003 * LRSchedule("cosine", 2).factor(step, end - start)
             for start, end in zip(ends, ends[1:], strict=False)
             for step in range(end - start)]  # fmt: skip
    for column in ("learning_rate/default", "learning_rate/default/no_decay"):
        assert [float(line[column]) for line in trained] == pytest.approx(rates)


def test_the_scores_are_those_of_the_matrix(logged):
    matrix = logged.matrix("alone")
    scored = [line for line in lines(logged, "alone") if "score/task-a" in line]
    assert len(scored) == 4
    for row, line in enumerate(scored):
        found = [float(line[f"score/{name}"]) for name in matrix.names]
        assert found == list(matrix.values[row])
        if row:
            average = sum(matrix.values[row][:row]) / row
            assert float(line["average_accuracy"]) == pytest.approx(average)
        if row > 1:
            lost = [
                max(matrix.values[r][task] for r in range(task + 1, row)) - matrix.values[row][task]
                for task in range(row - 1)
            ]
            assert float(line["forgetting"]) == pytest.approx(sum(lost) / len(lost))


@pytest.mark.parametrize("step", [1, 3, 4, 5, 6, 9])
def test_a_run_killed_at_a_step_ends_with_the_same_csv_file(logged, step):
    name = f"step{step}"
    killed_and_finished(logged, name, [("step", step)], **options("true"))
    assert lines(logged, name) == lines(logged, "alone")
    assert logged.differences(name, "alone") == []


def test_kills_between_any_two_files_end_with_the_same_csv_file(logged):
    killed_and_finished(logged, "between", BETWEEN, **options("true"))
    assert lines(logged, "between") == lines(logged, "alone")


def test_a_logger_changes_no_weight_and_a_finished_run_logs_nothing_more(logged):
    logged.finish("quiet", strategy())
    assert logged.differences("quiet", "alone") == []
    assert not (logged.path("quiet") / "loggers.json").exists()
    before = lines(logged, "alone")
    logged.finish("alone", strategy(), **options("true"))
    assert lines(logged, "alone") == before


def test_a_log_that_begins_later_has_the_scores_of_all_rows(logged):
    assert logged.start("later", strategy(), ("step", 7))[0] == KILLED
    logged.finish("later", strategy(), **options("true"))
    expected = [line for line in lines(logged, "alone") if "score/task-a" in line]
    assert [line for line in lines(logged, "later") if "score/task-a" in line] == expected


@pytest.mark.parametrize("version", [None, "mine"])
def test_a_csv_logger_has_one_folder_for_tasks_evaluations_and_resumes(logged, version):
    name, folder = f"csv-{version}", logged.folder / f"logs-{version}"
    own = {"trainer__logger.save_dir": folder, "trainer__logger.name": "small"}
    if version:
        own["trainer__logger.version"] = version
    killed_and_finished(logged, name, [("step", 5)], **options("CSVLogger", **own))
    (file,) = folder.rglob("*.*")
    assert file.relative_to(folder).as_posix() == f"small/{version or 'version_0'}/metrics.csv"
    with file.open(newline="") as opened:
        found = [{k: v for k, v in line.items() if v} for line in csv.DictReader(opened)]
    assert found == lines(logged, "alone")


def test_what_lightning_logs_itself_has_the_steps_of_the_run(logged):
    monitor = json.dumps([{"class_path": "LearningRateMonitor"}])
    killed_and_finished(
        logged, "monitor", [("step", 6)], **options("true", trainer__callbacks=monitor)
    )
    found = [int(line["step"]) for line in lines(logged, "monitor") if "lr-AdamW/default" in line]
    total = sum("train/loss" in line for line in lines(logged, "alone"))
    assert found == sorted(found)
    assert sorted(set(found)) == list(range(1, total + 1))
    logged.finish("monitored", strategy(), **options("true", trainer__callbacks=monitor))
    assert lines(logged, "monitor") == lines(logged, "monitored")


def scalars(folder):
    """Every event that TensorBoard shows, tag -> (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (version,) = (folder / "small").iterdir()
    events = EventAccumulator(str(version), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_every_step_once_after_a_kill(logged):
    pytest.importorskip("tensorboard")
    folder = logged.folder / "tensorboard"
    own = {"trainer__logger.save_dir": folder, "trainer__logger.name": "small"}
    changes = options("TensorBoardLogger", **own)
    killed_and_finished(logged, "tensorboard", [("step", 3), ("step", 4), ("matrix", 1)], **changes)
    found = scalars(folder)
    expected = {}
    for line in lines(logged, "alone"):
        for tag in set(line) - {"step"}:
            expected.setdefault(tag, []).append(
                (int(line["step"]), pytest.approx(float(line[tag])))
            )
    assert found == expected


def test_wandb_has_one_run_and_every_step_once_after_a_kill(logged):
    folder = logged.folder / "wandb"
    folder.mkdir()
    changes = options(
        "WandbLogger", **{"trainer__logger.save_dir": folder, "trainer__logger.offline": "true"}
    )
    run = partial(logged.start, "wandb", strategy(), before=[toy_wandb.install], **changes)
    for moment in (("step", 3), ("step", 4), ("matrix", 1)):
        status, output = run(kill=moment)
        assert status == KILLED, output
    status, output = run()
    assert status == 0, output
    (file,) = folder.iterdir()
    sent = [json.loads(line) for line in file.read_text().splitlines()]
    assert sent.pop() == {"finished": True}
    expected = [{k: float(v) for k, v in line.items()} for line in lines(logged, "alone")]
    for line in expected:
        line["trainer/global_step"] = line.pop("step")
    assert sent == [pytest.approx(line) for line in expected]
