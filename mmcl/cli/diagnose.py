"""Diagnostics of runs: ``mmcl diagnose``, ``mmcl connect`` and ``mmcl similarity``."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.cli.run_commands import numbers
from mmcl.cli.train import with_progress
from mmcl.core import write_atomic
from mmcl.diagnostics import (
    Checkpoint,
    ProbeData,
    compare_representations,
    connect,
    flatness,
    linear_probe,
    recovery,
)
from mmcl.diagnostics.connectivity import file_part
from mmcl.diagnostics.flatness import SIGMAS
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.diagnostic_record import DIAGNOSTICS, Diagnostic
from mmcl.evaluation.run_files import FIGURES, MATRIX
from mmcl.lightning.checkpoints.checkpoint_checks import LostCheckpoint
from mmcl.lightning.config.run_reference import RunReference, find_run_dir, finished_tasks
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.report import write_report
from mmcl.report.diagnostic_output import diagnostic_csv, diagnostic_table, draw_diagnostic

_OWN_STREAM = ("data.task_order", "data.task_epochs", "data.repeats")
"""Settings of the order of a run's stream, which say nothing about another one."""


def connect_checkpoints(argv: Sequence[str]) -> int:
    """Measure loss and score on the straight line between two checkpoints, and the barrier."""
    parser = _pair_parser("mmcl connect", connect_checkpoints.__doc__)
    parser.add_argument(
        "--points",
        type=int,
        default=26,
        help="evenly spaced points, both ends included (%(default)s)",
    )
    parser.add_argument("--samples", type=int, help="test samples of each task, at most (all)")
    parser.add_argument("--no_score", action="store_true", help="measure the loss alone")
    given, rest = parser.parse_known_args(argv)
    first, second, probes = _open_pair(given, rest, "mmcl connect")
    ends = [Checkpoint(one.name, one.tasks, one.load) for one in (first, second)]
    wanted = _chosen_tasks(given, probes, max(first.tasks, second.tasks))
    found = connect(
        ends[0],
        ends[1],
        probes,
        wanted,
        row=None if given.data is None else len(probes.data.stream),
        points=given.points,
        with_score=not given.no_score,
    )
    _write(first.folder, found)
    return _finish(first.folder, [found])


def compare_checkpoints(argv: Sequence[str]) -> int:
    """Compare the layers and attention heads of two checkpoints on the same probe samples."""
    parser = _pair_parser("mmcl similarity", compare_checkpoints.__doc__)
    parser.add_argument(
        "--samples", type=int, default=256, help="probe samples, over all tasks (%(default)s)"
    )
    parser.add_argument("--no_attention", action="store_true", help="compare features alone")
    given, rest = parser.parse_known_args(argv)
    first, second, probes = _open_pair(given, rest, "mmcl similarity")
    wanted = _chosen_tasks(given, probes, len(probes.data.stream))
    probes.samples = max(1, -(-given.samples // len(wanted)))
    found, heads = compare_representations(
        (file_part(first.name), file_part(second.name)),
        (first.load(), second.load()),
        probes,
        wanted,
        with_attention=not given.no_attention,
    )
    _write(first.folder, found)
    if heads:
        file = first.folder / DIAGNOSTICS / f"{found.name}_heads.csv"
        write_atomic(file, _heads_csv(heads))
    return _finish(first.folder, [found])


def main(argv: Sequence[str]) -> int:
    """Measure flatness, linear probes or recovery over the states of a run."""
    parser = CommandParser(prog="mmcl diagnose", description=main.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument(
        "--what", default="all", help=f"any of {', '.join(_DIAGNOSES)}, with commas (%(default)s)"
    )
    parser.add_argument(
        "--after_task", metavar="N", help="states: 0 = before training; 0-5; 1,4 (all finished)"
    )
    parser.add_argument("--tasks", metavar="N", help="tasks from 0; 0-5; 1,4 (all)")
    parser.add_argument(
        "--samples", type=int, default=256, help="samples of a split, at most (%(default)s)"
    )
    parser.add_argument(
        "--sigmas", type=_numbers_of, default=SIGMAS, metavar="S,S",
        help="flatness: sizes of the noise, relative to each weight tensor (0.001,0.003,0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--draws", type=int, default=3, help="flatness: draws of the noise (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of noise and held-out parts (0)")
    given, rest = parser.parse_known_args(argv)
    names = list(_DIAGNOSES) if given.what == "all" else given.what.split(",")
    unknown = [name for name in names if name not in _DIAGNOSES]
    if unknown:
        raise UsageError(
            f"--what is '{given.what}', and there is no '{unknown[0]}': choose any of "
            f"{', '.join(_DIAGNOSES)}, or all"
        )
    reference = RunReference(find_run_dir(given.run))
    run = reference.open(rest, "mmcl diagnose", with_progress)
    loader = StateLoader(run)
    given.rows = numbers(given.after_task, finished_tasks(run) + 1, "after_task")
    probes = ProbeData(run.data, loader.device, given.samples, loader.precision)
    matrix = _matrix(reference.folder)
    found, skipped = [], []
    for name in names:
        try:
            result = _DIAGNOSES[name](given, loader, probes, matrix)
        except (ValueError, TypeError) as error:
            if given.what != "all":
                raise
            skipped.append(f"{name} is left out: {error}")
            continue
        _write(reference.folder, result)
        found.append(result)
    for sentence in (*loader.lost, *skipped):
        print(sentence)
    return _finish(reference.folder, found)


def _numbers_of(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


class StateLoader:
    """Loads states of a run in evaluation mode on the run's first device.

    Attributes:
        device: of the run's Trainer.
        precision: makes the context of the Trainer's precision.
        lost: checkpoints that are missing or damaged, a sentence each.
    """

    def __init__(self, run: ContinualRun) -> None:
        self.run = run
        self.lost: dict[str, None] = {}
        run.data.prepare_data()
        run.data.setup()
        folder = str(run.folder.path)
        trainer = run.make_trainer(callbacks=[], logger=False, default_root_dir=folder)
        self.device = trainer.strategy.root_device
        self.precision: Any = trainer.precision_plugin.forward_context

    def load(self, row: int) -> ContinualModule:
        """Load the state after ``row`` tasks."""
        module = self.run.load_after(row)
        return module.eval().to(self.device)

    def load_or_none(self, row: int) -> ContinualModule | None:
        """Load the state after ``row`` tasks, None if its checkpoint is lost, which is noted."""
        try:
            return self.load(row)
        except LostCheckpoint as lost:
            self.lost[f"{lost.reason}: this state is left out"] = None
            return None


class _End:
    """State of a run that a command line names: its name, number of tasks, and loader."""

    def __init__(self, text: str, changes: Sequence[str], program: str) -> None:
        reference = RunReference.parse(text)
        self.folder = reference.folder
        self.run = reference.open(changes, program, with_progress)
        self.loader = StateLoader(self.run)
        self.tasks = reference.finished_tasks(self.run)
        self.name = f"{self.folder.resolve().name}@{reference.state or self.tasks}"

    def load(self) -> ContinualModule:
        """Load the module in this state."""
        return self.loader.load(self.tasks)


def _pair_parser(program: str, description: str | None) -> CommandParser:
    parser = CommandParser(prog=program, description=description)
    word = "checkpoint: RUN (its last task), RUN@3 (after three tasks) or RUN@task"
    parser.add_argument("first", help=word)
    parser.add_argument("second", help="another one, of the same architecture")
    parser.add_argument(
        "--data", metavar="CARD_OR_RUN", help="card or run whose tasks are measured (the first run)"
    )
    parser.add_argument("--tasks", metavar="N", help="tasks from 0, then eval-only tasks; 0-5; 1,4")
    return parser


def _open_pair(given: Any, rest: Sequence[str], program: str) -> tuple[_End, _End, ProbeData]:
    first, second = (_End(text, rest, program) for text in (given.first, given.second))
    if (first.folder, first.tasks) == (second.folder, second.tasks):
        raise UsageError(f"{given.first} and {given.second} are the same checkpoint: give two")
    data = first.run.data if given.data is None else other_data(given.data, given.first, rest)
    samples = getattr(given, "samples", None)
    return first, second, ProbeData(data, first.loader.device, samples, first.loader.precision)


def other_data(name: str, run: str, rest: Sequence[str]) -> ContinualDataModule:
    """Return the opened data of another run, or of a card with the settings of a run."""
    try:
        data = RunReference(find_run_dir(name)).open(rest, prepare=with_progress).data
    except FileNotFoundError:
        own = [word for key in _OWN_STREAM for word in (f"--{key}", "null")]
        changes = [*rest, "--data.stream", name, *own]
        data = RunReference.parse(run).open(changes, prepare=with_progress).data
    data.prepare_data()
    data.setup()
    return data


def _chosen_tasks(given: Any, probes: ProbeData, learned: int) -> list[int]:
    """Return the tasks to measure: those chosen, else the learned ones, repeated ones once."""
    stream = probes.data.stream
    if given.tasks is not None:
        return numbers(given.tasks, len(stream.all_tasks), "tasks")
    own = len(stream) if given.data is not None else min(max(learned, 1), len(stream))
    return [number for number in range(own) if stream.first_occurrence(number) == number]


def _matrix(folder: Path) -> AccuracyMatrix | None:
    return AccuracyMatrix.read(folder / MATRIX) if (folder / MATRIX).is_file() else None


def _run_flatness(
    given: Any, loader: StateLoader, probes: ProbeData, matrix: AccuracyMatrix | None
) -> Diagnostic:
    tasks = None if given.tasks is None else _trained_tasks(given, probes)
    return flatness(
        loader.load_or_none, probes, given.rows, tasks, sigmas=given.sigmas, draws=given.draws,
        seed=given.seed,
    )  # fmt: skip


def _run_linear_probe(
    given: Any, loader: StateLoader, probes: ProbeData, matrix: AccuracyMatrix | None
) -> Diagnostic:
    tasks = _trained_tasks(given, probes)
    return linear_probe(loader.load_or_none, probes, given.rows, tasks, matrix, seed=given.seed)


def _run_recovery(
    given: Any, loader: StateLoader, probes: ProbeData, matrix: AccuracyMatrix | None
) -> Diagnostic:
    tasks = _trained_tasks(given, probes)
    return recovery(loader.load_or_none, probes, given.rows, matrix, tasks)


_DIAGNOSES: Mapping[str, Callable[..., Diagnostic]] = {
    "flatness": _run_flatness,
    "linear_probe": _run_linear_probe,
    "recovery": _run_recovery,
}


def _trained_tasks(given: Any, probes: ProbeData) -> list[int]:
    stream = probes.data.stream
    chosen = numbers(given.tasks, len(stream), "tasks")
    return list(dict.fromkeys(stream.first_occurrence(number) for number in chosen))


def _write(folder: Path, diagnostic: Diagnostic) -> None:
    """Write the record, its csv table and its figure into a run directory."""
    diagnostic.write(folder / DIAGNOSTICS / f"{diagnostic.name}.json")
    write_atomic(folder / DIAGNOSTICS / f"{diagnostic.name}.csv", diagnostic_csv(diagnostic))
    write_atomic(folder / FIGURES / f"{diagnostic.name}.png", draw_diagnostic(diagnostic, "png"))


def _finish(folder: Path, found: Sequence[Diagnostic]) -> int:
    """Print the results, and write the report of the run again."""
    for diagnostic in found:
        print(diagnostic_table(diagnostic))
        print(f"files: {folder / DIAGNOSTICS / diagnostic.name}.json and .csv")
        print(f"figure: {folder / FIGURES / diagnostic.name}.png")
    if found:
        print(f"report: {write_report(folder)}")
    return 0


def _heads_csv(heads: Mapping[Any, Sequence[float]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["tower", "layer", "head", "cosine"])
    for layer, values in heads.items():
        for head, value in enumerate(values):
            writer.writerow([layer.tower, layer.number, head, repr(value)])
    return text.getvalue().encode()
