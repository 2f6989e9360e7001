"""Loggers of a run, shared by all tasks: continuous steps, scores of every row, and resumes.

The line that shows a task's progress on a terminal is here too.
"""

from __future__ import annotations

import csv
import io
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmcl.core import write_atomic
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.continual_metrics import average_accuracy, forgetting
from mmcl.lightning.run_dir import RunDirectory

RECORD = "loggers.json"
_SCORE = "score/"
_REDRAW_SECONDS = 0.1


class RunLoggers:
    """Loggers that all Trainers of a run share; a step is logged once, also if the run is killed.

    Step n is the n-th optimizer step of the run, over all tasks; step 0 is before training. What
    was logged after the checkpoint that a run resumes from is removed from CSV files, hidden in
    TensorBoard (``purge_step``), and not logged again by other loggers, W&B among them.

    ``loggers.json`` in the run directory holds each logger's version or id, the rows of the matrix
    that were logged with the step of the last one, and the last step of other loggers.

    Args:
        loggers: of Lightning; they belong to this run alone.
        folder: run directory.
    """

    def __init__(self, loggers: Sequence[Logger], folder: RunDirectory) -> None:
        self.loggers = list(loggers)
        self._folder = folder
        self._versions: dict[str, Any] = {}
        self._rows, self._scored_step, self._last_step = 0, -1, -1
        self._resumed_after = -1
        self._appends_only = [
            each for each in self.loggers if not isinstance(each, CSVLogger | TensorBoardLogger)
        ]

    def resume(self, step: int, rows: int) -> None:
        """Continue where the run resumes; once, before anything is logged.

        Args:
            step: optimizer steps of the run that are kept.
            rows: rows of the matrix that these steps may have, finished tasks + 1.

        Raises:
            ValueError: if ``loggers.json`` is not the record of a run's loggers.
        """
        if not self.loggers or not self._folder.writes:
            return
        before = self._read()
        self._rows, self._scored_step = min(self._rows, rows), min(self._scored_step, step)
        for number, logger in enumerate(self.loggers):
            key = f"{number} {type(logger).__name__}"
            known = before.get(key)
            if isinstance(logger, WandbLogger):
                _set_wandb_id(logger, known)
            elif isinstance(logger, CSVLogger | TensorBoardLogger) and known is not None:
                if logger._version is None:
                    logger._version = known
                if isinstance(logger, TensorBoardLogger):
                    logger._kwargs["purge_step"] = step + 1
                else:
                    logger._experiment = _ContinuedWriter(logger.log_dir, step, self._scored_step)
            self._versions[key] = logger.version
        self._resumed_after = self._last_step
        self._write()  # before anything is logged

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log values of an optimizer step."""
        repeated = self._appends_only if step <= self._resumed_after else []
        for logger in self.loggers:
            if logger not in repeated:
                logger.log_metrics(dict(values), step)
        if self._appends_only and step > self._last_step:
            self._last_step = step
            self._write()

    def log_row(self, matrix: AccuracyMatrix, row: int, step: int, columns: Sequence[int]) -> None:
        """Log the scores of a row, its average accuracy and its forgetting, as fractions.

        Args:
            matrix: the scores.
            row: 0 = before training, t = after t tasks.
            step: optimizer steps of the run at that time.
            columns: what was measured now; all columns of a row that was not logged before.
        """
        if not self.loggers:
            return
        is_new = row >= self._rows
        values = {
            f"{_SCORE}{matrix.names[column]}": value
            for column in (range(len(matrix.columns)) if is_new else columns)
            if (value := matrix.get(row, column)) is not None
        }
        if is_new and row:
            metrics = {
                "average_accuracy": average_accuracy(matrix, row),
                "forgetting": forgetting(matrix, row),
            }
            values |= {name: m.value for name, m in metrics.items() if m.value is not None}
        if values:
            for logger in self.loggers:
                logger.log_metrics(dict(values), step)
            self.flush()
        if is_new:
            self._rows, self._scored_step = row + 1, step
            self._write()

    def flush(self) -> None:
        """Write what was logged so far, before a checkpoint that makes a resume skip it."""
        for logger in self.loggers:
            if (
                not isinstance(logger, CSVLogger | TensorBoardLogger)
                or logger._experiment is not None
            ):
                logger.save()

    def close(self) -> None:
        """End W&B's run, or the next run in this process would continue it."""
        for logger in self.loggers:
            if isinstance(logger, WandbLogger) and logger._experiment is not None:
                logger.experiment.finish()

    def _read(self) -> dict[str, Any]:
        file = self._folder.path / RECORD
        if not file.is_file():
            return {}
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            self._rows, self._last_step = int(record["rows"]), int(record["last_step"])
            self._scored_step = int(record["scored_step"])
            return dict(record["versions"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{file} is not the record of a run's loggers ({type(error).__name__}: {error}): "
                "remove it, and the run logs into new versions"
            ) from None

    def _write(self) -> None:
        record = {
            "rows": self._rows,
            "scored_step": self._scored_step,
            "last_step": self._last_step,
            "versions": self._versions,
        }
        self._folder.write(RECORD, json.dumps(record, indent=1) + "\n")


def _set_wandb_id(logger: WandbLogger, known: str | None) -> None:
    """Give W&B's run an id that a later process knows; its logger resumes a run of that id."""
    if logger._id is None and logger._experiment is None:
        logger._id = logger._wandb_init["id"] = known or secrets.token_hex(4)


class _ContinuedWriter(ExperimentWriter):
    """Writer of a CSV file that an earlier process began, which Lightning's would delete.

    Args:
        log_dir: folder of the file.
        step: lines of later steps are dropped, and a line that a kill cut off.
        scored_step: scores of later steps are dropped, because they will be logged again.
    """

    def __init__(self, log_dir: str, step: int, scored_step: int) -> None:
        super().__init__(log_dir)
        if not self._fs.isfile(self.metrics_file_path):
            return
        with self._fs.open(self.metrics_file_path, "r", newline="") as file:
            text = file.read()
        lines = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        self.metrics_keys = list(lines.fieldnames or ())
        kept = []
        for line in lines:
            is_score = any(value and _SCORE in name for name, value in line.items())
            if int(line["step"]) <= (scored_step if is_score else step):
                kept.append(line)
        self._write_lines(kept)

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def _write_lines(self, lines: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.metrics_keys)
        writer.writeheader()
        writer.writerows(lines)
        if "://" in self.metrics_file_path:
            with self._fs.open(self.metrics_file_path, "w", newline="") as file:
                file.write(text.getvalue())
        else:
            write_atomic(Path(self.metrics_file_path), text.getvalue())


class ProgressLine:
    """Progress line of a task, redrawn at most ten times a second; nothing without a terminal.

    Args:
        title: text before the bar.
        steps: total number of steps, None = unknown.
        is_shown: False on ranks other than 0.
    """

    def __init__(self, title: str, steps: int | None, is_shown: bool) -> None:
        self._next_draw, console = 0.0, Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=console, auto_refresh=False)
        self._line = bar.add_task(title, total=steps, loss="")
        self._bar = bar if is_shown and console.is_terminal else None
        if self._bar is not None:
            self._bar.start()

    def wants(self) -> bool:
        """Return whether the line is due to be drawn."""
        return self._bar is not None and time.monotonic() >= self._next_draw

    def show(self, step: int, loss: float) -> None:
        """Draw the line."""
        if self._bar is not None:
            self._next_draw = time.monotonic() + _REDRAW_SECONDS
            self._bar.update(self._line, completed=step, loss=f"loss {loss:.3f}", refresh=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
