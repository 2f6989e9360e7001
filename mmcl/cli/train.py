"""``mmcl train --config X``: train on a stream of tasks, or resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmcl.evaluation.run_files import read_lenient
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun, summarize
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.evaluate import save_sample_images
from mmcl.report import matrix_table, write_report

DESCRIPTION = (
    "Train on a stream of tasks, from one YAML file. The same command resumes a stopped run, "
    "trains on tasks that were appended to its card, and shows the results of a finished run. "
    "mmcl --help shows the commands."
)


def main(argv: Sequence[str]) -> int:
    """Train on the stream of a configuration and print the accuracy matrix."""
    cli = ContinualCLI(argv, program="mmcl", description=DESCRIPTION)
    # No line breaks: a path over two lines cannot be copied.
    console = Console(highlight=False, markup=False, soft_wrap=True)
    folder = cli.folder
    run = ContinualRun(
        cli.make_module,
        cli.make_trainer,
        with_progress(cli.make_data()),
        folder,
        seed=cli.seed,
        checkpoint_every_n_steps=int(cli.config["checkpoint_every_n_steps"]),
        log=console.print,
    )
    with run.folder.lock():
        run.folder.check_config(cli.plain())
        matrix = run.run()
        if run.is_first:
            images = save_sample_images(run.data, run.folder)
            summarize(run, cli.plain(), matrix, images)
            page = write_report(folder)
            print(matrix_table(matrix, lenient=read_lenient(matrix, folder), width=console.width))
            print(f"report: {page}")
    return 0


def with_progress(data: ContinualDataModule) -> ContinualDataModule:
    """Show a progress bar on a terminal while the stream of a datamodule is built."""
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
    """Find a run directory by its path or its name under ``runs``.

    Raises:
        FileNotFoundError: if there is neither.
    """
    for folder in (Path(name), Path(runs) / name):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"there is no run {name}: give a run directory (it has a config.yaml), "
        f"or its name under {runs}/"
    )


def run_lightning(argv: Sequence[str]) -> int:
    """Run one of Lightning's commands; ``predict`` prints a line for every sample."""
    cli = ContinualCLI(argv, subcommands=True, program="mmcl")
    if argv[0] == "predict" and cli.trainer.is_global_zero:
        for answers in cli.trainer.predict_loop.predictions:
            print("\n".join(f"{key}\t{answer}" for key, answer in answers))
    return 0
