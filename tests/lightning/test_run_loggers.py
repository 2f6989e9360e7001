"""The loggers of a run: each step once, whatever was killed when."""

import csv
import importlib.util
import json

import pytest
from pytorch_lightning.loggers import CSVLogger, Logger

from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.matrix import Column
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.config.config_errors import ConfigError
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.run_loggers import RECORD, RunLoggers
from tests.lightning.small_runs import SmallRuns


class AppendOnly(Logger):
    """Sends what it is given and takes nothing back."""

    name, version = "append only", "one"

    def __init__(self, sent):
        super().__init__()
        self.sent = sent

    def log_metrics(self, metrics, step=None):
        self.sent.append((step, sorted(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def a_matrix(rows):
    """Two tasks; row r has r / 10 and r / 5."""
    matrix = AccuracyMatrix("stream", "class", [Column("a"), Column("b")])
    for row in range(rows):
        matrix.set(row, 0, row / 10)
        matrix.set(row, 1, row / 5)
    return matrix


def started(folder, logger=None, step=0, rows=1):
    """Loggers of a process that starts after a step."""
    logger = CSVLogger(folder / "logs", name=None) if logger is None else logger
    loggers = RunLoggers([logger], RunDirectory(folder))
    loggers.resume(step, rows)
    return loggers


def lines(folder):
    """The lines of the only CSV file."""
    (file,) = folder.rglob("metrics.csv")
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def steps(folder, column):
    return [int(line["step"]) for line in lines(folder) if line[column]]


def test_a_resumed_run_continues_its_csv_file_and_repeats_no_step(tmp_path):
    first = started(tmp_path)
    for step in range(1, 6):
        first.log({"train/loss": step}, step)
    first.flush()
    second = started(tmp_path, step=3)
    for step in range(4, 8):
        second.log({"train/loss": 10 * step, "train/new": 1}, step)
    second.flush()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["version_0"]
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [
        ("1", "1"), ("2", "2"), ("3", "3"), ("4", "40"), ("5", "50"), ("6", "60"), ("7", "70"),
    ]  # fmt: skip
    assert steps(tmp_path, "train/new") == [4, 5, 6, 7]


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    first = started(tmp_path)
    first.log({"train/loss": 0.125}, 1)
    first.log({"train/loss": 0.25}, 2)
    first.flush()
    (file,) = tmp_path.rglob("metrics.csv")
    file.write_bytes(file.read_bytes()[:-3])  # 0.2 instead of 0.25
    second = started(tmp_path, step=1)
    second.log({"train/loss": 0.25}, 2)
    second.flush()
    assert [line["train/loss"] for line in lines(tmp_path)] == ["0.125", "0.25"]


def test_scores_of_every_row_are_logged_with_average_accuracy_and_forgetting(tmp_path):
    loggers, matrix = started(tmp_path), a_matrix(3)
    for row, step in enumerate((0, 4, 9)):
        loggers.log_row(matrix, row, step, range(2))
    found = [
        {name: float(value) for name, value in line.items() if value} for line in lines(tmp_path)
    ]
    assert found == [
        {"step": 0, "score/a": 0.0, "score/b": 0.0},
        {"step": 4, "score/a": 0.1, "score/b": 0.2, "average_accuracy": 0.1},
        {"step": 9, "score/a": 0.2, "score/b": 0.4, "average_accuracy": pytest.approx(0.3),
         "forgetting": pytest.approx(-0.1)},
    ]  # fmt: skip


def test_a_kill_between_the_scores_and_their_record_leaves_them_once(tmp_path):
    first = started(tmp_path)
    first.log_row(a_matrix(1), 0, 0, range(2))
    first.log({"train/loss": 1.0}, 2)
    record = (tmp_path / RECORD).read_text()
    first.log_row(a_matrix(2), 1, 2, range(2))
    (tmp_path / RECORD).write_text(record)
    second = started(tmp_path, step=2, rows=2)
    for row, step in ((0, 0), (1, 2)):
        second.log_row(a_matrix(2), row, step, ())
    assert steps(tmp_path, "score/a") == [0, 2]
    assert steps(tmp_path, "train/loss") == [2]


def test_scores_that_were_never_logged_are_logged_by_the_next_process(tmp_path):
    first = started(tmp_path)
    first.log_row(a_matrix(1), 0, 0, range(2))
    second = started(tmp_path, step=2, rows=2)
    for row, step in ((0, 0), (1, 2)):
        second.log_row(a_matrix(2), row, step, ())
    assert steps(tmp_path, "score/a") == [0, 2]


def test_a_new_column_of_a_logged_row_is_logged_alone(tmp_path):
    first, matrix = started(tmp_path), a_matrix(1)
    matrix.set(0, 1, None)
    first.log_row(matrix, 0, 0, [0])
    first.log_row(a_matrix(1), 0, 0, [1])
    assert [(line["score/a"], line["score/b"]) for line in lines(tmp_path)] == [
        ("0.0", ""), ("", "0.0"),
    ]  # fmt: skip


def test_a_run_that_falls_back_a_task_logs_its_row_again_once(tmp_path):
    first = started(tmp_path)
    for row, step in enumerate((0, 4, 9)):
        first.log_row(a_matrix(3), row, step, range(2))
    second = started(tmp_path, step=4, rows=2)
    second.log_row(a_matrix(3), 1, 4, ())
    second.log_row(a_matrix(3), 2, 9, range(2))
    assert steps(tmp_path, "score/a") == [0, 4, 9]


def test_a_logger_that_takes_nothing_back_is_not_given_a_step_twice(tmp_path):
    sent = []
    first = started(tmp_path, AppendOnly(sent))
    first.log_row(a_matrix(1), 0, 0, range(2))
    for step in range(1, 6):
        first.log({"train/loss": step}, step)
    second = started(tmp_path, AppendOnly(sent), step=3)
    for step in range(4, 8):
        second.log({"train/loss": step}, step)
    assert [step for step, _ in sent] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_loggers_writes_no_record(tmp_path):
    loggers = RunLoggers([], RunDirectory(tmp_path))
    loggers.resume(0, 1)
    loggers.log_row(a_matrix(1), 0, 0, range(2))
    loggers.flush()
    assert list(tmp_path.iterdir()) == []


def test_another_file_in_place_of_the_record_is_refused_by_name(tmp_path):
    (tmp_path / RECORD).write_text(json.dumps({"rows": "many"}))
    with pytest.raises(ValueError, match=r"loggers\.json is not the record.*remove it, and"):
        started(tmp_path)


def loggers_of(tmp_path, *options):
    words = SmallRuns(tmp_path).words("run")
    return ContinualCLI([*words, *options]).make_loggers()


def test_the_default_is_no_logger_and_true_writes_into_the_run_directory(tmp_path):
    assert loggers_of(tmp_path) == []
    (logger,) = loggers_of_again(tmp_path, "--trainer.logger=true")
    assert logger.log_dir == str(tmp_path / "runs" / "run" / "logs")


def loggers_of_again(tmp_path, *options):
    words = ["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "runs")]
    return ContinualCLI([*words, "--run_name=run", *options]).make_loggers()


@pytest.mark.parametrize(("name", "package"), [("Wandb", "wandb"), ("TensorBoard", "tensorboard")])
def test_a_missing_package_is_named_with_its_pip_command(tmp_path, name, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    options = [f"--trainer.logger={name}Logger", f"--trainer.logger.save_dir={tmp_path}"]
    sentence = f"{name}Logger needs the package {package}, which is missing: pip install {package}"
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        loggers_of(tmp_path, *options)


def test_several_loggers_can_be_listed(tmp_path):
    listed = [{"class_path": "CSVLogger", "init_args": {"save_dir": name}} for name in "ab"]
    found = loggers_of(tmp_path, f"--trainer.logger={json.dumps(listed)}")
    assert [logger.save_dir for logger in found] == ["a", "b"]


def test_a_logger_without_a_folder_names_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"CSVLogger without save_dir: set trainer\.logger\.save"):
        loggers_of(tmp_path, "--trainer.logger=CSVLogger")
