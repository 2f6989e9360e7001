"""``mmcl --config X``: learn a stream of tasks, or go on with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmcl.lightning.cells import sample_pictures
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.data import ContinualData
from mmcl.lightning.sequence import SequenceRun
from mmcl.lightning.summary import summarize
from mmcl.metrics.leniency import read_lenient
from mmcl.report import matrix_table, write_report

DESCRIPTION = (
    "Learn a stream of tasks, from one YAML file. The same command goes on with a run that was "
    "stopped, trains what was appended to its card, and shows the result of a finished one. "
    "mmcl --help shows the commands."
)


def main(argv: Sequence[str]) -> int:
    """Run the sequence of a configuration and print its table."""
    cli = ContinualCLI(argv, program="mmcl", description=DESCRIPTION)
    # Lines stay whole: a path that is cut into two cannot be copied.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = cli.folder
    run = SequenceRun(
        cli.make_module,
        cli.make_trainer,
        with_progress(cli.make_data()),
        folder,
        seed=cli.seed,
        save_every_steps=int(cli.config["save_every_steps"]),
        say=console.print,
    )
    with run.folder.held():
        run.folder.claim(cli.plain())
        matrix = run.run()
        if run.is_first:
            pictures = sample_pictures(run.data, run.folder)
            summarize(run, cli.plain(), matrix, pictures)
            page = write_report(folder)
            print(matrix_table(matrix, lenient=read_lenient(matrix, folder), width=console.width))
            print(f"report: {page}")
    return 0


def with_progress(data: ContinualData) -> ContinualData:
    """Show a bar on a terminal while the stream of a datamodule is built."""
    console = Console(stderr=True)
    if not console.is_terminal:
        return data
    bar = Progress(console=console, transient=True)
    line = bar.add_task(f"building {data.stream_name}", visible=False)

    def show(done: int, total: int) -> None:
        bar.start()
        bar.update(line, completed=done, total=total, visible=True)
        if done >= total:
            bar.stop()

    data.on_build = show
    return data


def run_folder(name: str, runs: str = "runs") -> Path:
    """Find a run by its path or its name under ``runs``.

    Raises:
        FileNotFoundError: if there is neither.
    """
    for folder in (Path(name), Path(runs) / name):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"there is no run {name}: give the folder of a run (it holds config.yaml), "
        f"or its name under {runs}/"
    )
