"""``mmcl check --config X``: dry run that prints estimates of time and memory."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmcl.cli.train import with_progress
from mmcl.lightning.config.cli import ContinualCLI
from mmcl.lightning.continual_run import first_process
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.dry_run import ROWS, DryRunReport, dry_run
from mmcl.lightning.run_dir import RunDirectory
from mmcl.lightning.summarize import model_name, name_of
from mmcl.report.formatting import size

DESCRIPTION = (
    "Dry run: load model and data, verify every shard, evaluate 32 samples of every task, train "
    "for two steps, and print estimates of time and memory. Nothing is written."
)


def main(argv: Sequence[str]) -> int:
    """Check a configuration with a dry run, and print the estimates."""
    cli = ContinualCLI(argv, program="mmcl check", description=DESCRIPTION)
    RunDirectory(cli.folder, writes=False).check_config(cli.plain())

    def make_data() -> ContinualDataModule:
        return with_progress(cli.make_data())

    report = dry_run(cli.make_module, cli.make_trainer, make_data)
    if first_process():
        config = cli.plain()["model"]
        names = f"{model_name(config['model'])}, {name_of(config['strategy'])}"
        console = Console(highlight=False, markup=False)
        console.print(_tasks_table(report))
        console.print(_costs_table(report, names))
        for error in report.errors:
            console.print(f"cannot be read: {error}")
        console.print(f"the configuration works; nothing was written to {cli.folder}")
    return 0


def _tasks_table(report: DryRunReport) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "type"):
        table.add_column(title)
    for title in ("training", "test", "steps", f"score of {ROWS} samples"):
        table.add_column(title, justify="right")
    for index, task in enumerate(report.stream.all_tasks):
        score = report.scores[index]
        table.add_row(
            task.name,
            "eval-only" if task.is_eval_only else task.task_type,
            "-" if task.is_eval_only else f"{task.size:,}",
            f"{task.test_size:,}",
            "-" if task.is_eval_only else f"{report.steps[index]:,}",
            "-" if score is None else f"{100 * score:.0f} %",
        )
    return table


def _costs_table(report: DryRunReport, names: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    tasks = len(report.stream)
    parts = (
        f"training {duration(report.train_seconds)}, end of tasks {duration(report.pass_seconds)}, "
        f"evaluation {duration(report.test_seconds)}"
    )
    device = f"{report.device}, 1 process" if report.world == 1 else f"{report.world} processes"
    samples = report.remembered_rows
    seen = f"the first {samples} samples" if samples else "two steps"
    rows = {
        "stream": f"{report.stream.name}, {report.stream.scenario}-incremental, {tasks} tasks",
        "model, strategy": names,
        "parameters": f"{report.parameters:,}; {report.learning:,} trainable, with the strategy's",
        "device": device,
        "a step": f"{1000 * report.step_seconds:.1f} ms",
        "the run": f"about {duration(report.seconds)}: {parts}",
        "memory": _memory(report),
        "checkpoints": f"{tasks} x {size(report.task_bytes)}, and {size(report.last_bytes)} "
        "mid-task",
        "strategy state": f"{size(report.remembered_bytes)} after {seen}",
    }
    for title, text in rows.items():
        table.add_row(title, text)
    return table


def _memory(report: DryRunReport) -> str:
    peak = f"{size(report.peak_memory_bytes)} peak so far"
    if report.test_bytes:
        peak += f"; about {size(report.test_bytes)} to generate a batch of {report.eval_batch_size}"
    return peak


def duration(seconds: float) -> str:
    """Format an estimated time, rounded: "0.4 s", "12 s", "3 min", "2.5 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
