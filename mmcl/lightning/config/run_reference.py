"""Runs and their states by name: ``RUN``, ``RUN@3`` (after three tasks) or ``RUN@task``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmcl.core import TaskStream
from mmcl.evaluation.run_files import CONFIG
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule


def find_run_dir(name: str, runs: str = "runs") -> Path:
    """Find a run directory by its path or its name under ``runs``.

    Raises:
        FileNotFoundError: if there is neither.
    """
    for folder in (Path(name), Path(runs) / name):
        if (folder / CONFIG).is_file():
            return folder
    raise FileNotFoundError(
        f"there is no run {name}: give a run directory (it has a config.yaml), "
        f"or its name under {runs}/"
    )


@dataclass(frozen=True)
class RunReference:
    """State of a run, as the command line names it.

    Args:
        folder: run directory.
        state: "3" = after three tasks, "0" = before training, or the name of a task = after it;
            "" = after the last finished task.
    """

    folder: Path
    state: str = ""

    @classmethod
    def parse(cls, text: str, runs: str = "runs") -> RunReference:
        """Parse ``RUN``, ``RUN@3`` or ``RUN@task``; a folder with an @ in its name comes first.

        Raises:
            FileNotFoundError: if there is no such run.
        """
        try:
            return cls(find_run_dir(text, runs))
        except FileNotFoundError:
            name, at, state = text.rpartition("@")
            if not at:
                raise
            return cls(find_run_dir(name, runs), state)

    def finished_tasks(self, run: ContinualRun) -> int:
        """Return after how many tasks of a run this state is; its stream must be prepared.

        Raises:
            ValueError: if the run has not finished them, or has no such task.
        """
        done = finished_tasks(run)
        if not self.state:
            return done
        wanted = _number(self.state, run.data.stream)
        if wanted > done:
            raise ValueError(
                f"{self.folder}@{self.state} is after {wanted} tasks, and the run has finished "
                f"{done}: give 0 to {done}, or train it further"
            )
        return wanted

    def open(
        self,
        changes: Sequence[str] = (),
        program: str = "mmcl",
        prepare: Callable[[ContinualDataModule], ContinualDataModule] = lambda data: data,
    ) -> ContinualRun:
        """Build the run from its stored configuration, without its directory being written to.

        Args:
            changes: settings of a command line that override the stored ones.
            program: program name of an error.
            prepare: called with the datamodule, for example to show the progress of a build.
        """
        cli = ContinualCLI(["--config", str(self.folder / CONFIG), *changes], program=program)
        cli.run_folder = self.folder
        data = prepare(cli.make_data())
        return ContinualRun(cli.make_module, cli.make_trainer, data, self.folder, seed=cli.seed)

    def load(self, run: ContinualRun | None = None) -> ContinualModule:
        """Load the module in this state, in evaluation mode.

        Args:
            run: as ``open`` returned it, None = opened here.

        Raises:
            LostCheckpoint: if the checkpoint is missing or damaged.
            ValueError: if the run has no such state.
        """
        run = self.open() if run is None else run
        run.data.prepare_data()
        module = run.load_after(self.finished_tasks(run))
        module.eval()
        return module


def finished_tasks(run: ContinualRun) -> int:
    """Return how many tasks a run has finished, 0 if it was not started."""
    state = run.folder.state()
    return 0 if state is None else state.finished_tasks


def _number(state: str, stream: TaskStream) -> int:
    if state.isdigit():
        return int(state)
    names = [task.name for task in stream]
    if state not in names:
        raise ValueError(
            f"there is no task '{state}': give the number of trained tasks, 0 to {len(names)}, or "
            f"one of {', '.join(names)}"
        )
    return names.index(state) + 1
