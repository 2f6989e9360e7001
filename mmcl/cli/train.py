"""``mmcl train --config X``: train on a stream of tasks, or resume; ``mmcl --help``."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmcl.cli import COMMANDS, LIGHTNING
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.run_files import RECALLS, RETRIEVAL, read_lenient, read_retrieval
from mmcl.export.start_weights import prepare_start
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.evaluate import save_sample_images
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.stages.acceptance import GateBroken
from mmcl.lightning.summarize import summarize
from mmcl.report import matrix_table, retrieval_table, write_report

_INTRODUCTION = (
    "Train a vision-language model on a stream of tasks, from one YAML file. The same command "
    "resumes a stopped run, trains on tasks that were appended to its card, and shows the results "
    "of a finished run."
)
_NOTES = (
    "A second --config overrides the first. A strategy can be given by its class name alone: "
    "--model.strategy EWC --model.strategy.ewc_lambda 10. --print_config shows the whole "
    "configuration, --debug the trace of an error. mmcl train --help lists every setting, "
    "including those of Lightning's Trainer."
)


def main(argv: Sequence[str]) -> int:
    """Train on the stream of a configuration and print the accuracy matrix."""
    cli = ContinualCLI(
        argv, program="mmcl", description=f"{_INTRODUCTION} mmcl --help shows the commands."
    )
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
        keep_best=cli.config["keep_best"],
        gates=cli.make_gates(),
        budget=cli.make_budget(),
        show_progress=cli.config["trainer"]["enable_progress_bar"] is not False,
        log=console.print,
        loggers=cli.make_loggers(),
    )
    cleanup = _removed(folder, run.is_first) if cli.is_fast_dev_run else nullcontext()
    with cleanup, run.folder.lock():
        run.folder.check_config(cli.plain())
        if cli.start_from:
            prepare_start(folder, cli.start_from, is_first=run.is_first)
        broken: GateBroken | None = None
        try:
            matrix = run.run()
        except GateBroken as error:
            broken, matrix = error, error.matrix
        if run.is_first and not cli.is_fast_dev_run:
            images = save_sample_images(run.data, run.folder)
            summarize(run, cli.plain(), matrix, images)
            page = write_report(folder)
            print(matrix_table(matrix, lenient=read_lenient(matrix, folder), width=console.width))
            print_recalls(matrix, folder)
            print(f"report: {page}")
    if broken is not None:
        raise broken
    if run.is_first and cli.is_fast_dev_run:
        batches = int(cli.config["trainer"]["fast_dev_run"])
        print(f"fast_dev_run: everything ran on {batches} batches of every task; nothing was kept")
    return 0


def print_recalls(matrix: AccuracyMatrix, folder: Path) -> None:
    """Print the recalls of a run with captions, and the file that has those of all rows."""
    scores = read_retrieval(matrix, folder)
    if scores:
        print(retrieval_table(scores, width=Console().width))
        name = RECALLS if (folder / RECALLS).is_file() else RETRIEVAL
        print(f"recalls of all rows: {folder / name}")


@contextmanager
def _removed(folder: Path, is_first: bool) -> Iterator[None]:
    """Context at whose end a run directory is removed, and at whose start one left by a kill."""
    if is_first:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)


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


def run_lightning(argv: Sequence[str]) -> int:
    """Run one of Lightning's commands; ``predict`` prints a line for every sample."""
    cli = ContinualCLI(argv, subcommands=True, program="mmcl")
    if argv[0] == "validate" and cli.trainer.is_global_zero:
        data = cli.datamodule
        part = "validation part" if data.validation_share else "test split"
        hint = (
            "" if data.validation_share else "; data.validation_share holds a part out for choices"
        )
        print(f"validated on the {part} of task '{data.stream[data.task_index].name}'{hint}")
    if argv[0] == "predict" and cli.trainer.is_global_zero:
        for answers in cli.trainer.predict_loop.predictions:
            print("\n".join(f"{key}\t{answer}" for key, answer in answers))
    return 0


def show_help(argv: Sequence[str]) -> int:
    """Print the commands and the settings of a run, a line each."""
    console = Console(highlight=False, markup=False)
    console.print(
        "usage: mmcl [command] --config X [--config OVERLAY] [--setting.name value ...]\n"
    )
    console.print(_INTRODUCTION + "\n")
    settings = {f"--{name}": summary for name, summary in _settings()}
    for title, rows in (("commands", COMMANDS | LIGHTNING), ("\nsettings", settings)):
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 2))
        for name, summary in rows.items():
            table.add_row(name, summary)
        console.print(f"{title}:")
        console.print(table)
    console.print("\n" + _NOTES)
    return 0 if argv else 2


def _settings() -> Iterator[tuple[str, str]]:
    yield (
        "run_name, --output_dir",
        "name of the run and directory of all runs: output_dir/run_name",
    )
    yield "seed_everything", "seed of the run"
    yield "checkpoint_every_n_steps", "steps between mid-task checkpoints, 0 = none"
    for group, cls in (("model", ContinualModule), ("data", ContinualDataModule)):
        text = inspect.getdoc(cls) or ""
        args = re.search(r"Args:\n(.*?)(?:\n\n|\Z)", text, re.DOTALL)
        entry = re.compile(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
        for match in entry.finditer(args[1] if args else ""):
            if match[1] != "seed":
                yield f"{group}.{match[1]}", " ".join(match[2].split())
    yield "keep_best", "end every task with the weights of its best validation: loss or score"
    yield (
        "budget",
        "limits: task.train_samples, stream.train_flops, stream.seconds, buffer_bytes ...",
    )
    yield "trainer.max_epochs", "epochs of every task; trainer.* are the arguments of Lightning's"
    yield "trainer.devices", "Trainer: accelerator, devices, strategy, precision, ..."
