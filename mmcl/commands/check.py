"""``mmcl check --config X``: load everything, try a little of it, say what the run will take."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmcl.commands.sequence import with_progress
from mmcl.lightning.checking import ROWS, Check, check
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.data import ContinualData
from mmcl.lightning.folder import RunFolder
from mmcl.lightning.sequence import first_process
from mmcl.lightning.summary import model_name, name_of

DESCRIPTION = (
    "Load model and data, verify every shard, score 8 rows of every task, take two training steps "
    "on a copy that is thrown away, and say what the run will take. The run's folder is not "
    "touched."
)


def main(argv: Sequence[str]) -> int:
    """Check a configuration and reckon its run."""
    cli = ContinualCLI(argv, program="mmcl check", description=DESCRIPTION)
    RunFolder(cli.folder, writes=False).claim(cli.plain())

    def make_data() -> ContinualData:
        return with_progress(cli.make_data())

    found = check(cli.make_module, cli.make_trainer, make_data)
    if first_process():
        config = cli.plain()["model"]
        names = f"{model_name(config['model'])}, {name_of(config['strategy'])}"
        console = Console(highlight=False, markup=False)
        console.print(_columns(found))
        console.print(_costs(found, names))
        for fault in found.faults:
            console.print(f"cannot be read: {fault}")
        console.print(f"the configuration works; nothing was written to {cli.folder}")
    return 0


def _columns(found: Check) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("task", "kind"):
        table.add_column(title)
    for title in ("training", "test", "steps", f"score of {ROWS} rows"):
        table.add_column(title, justify="right")
    for place, task in enumerate(found.stream.columns):
        score = found.scores[place]
        table.add_row(
            task.name,
            "probe" if task.is_probe else task.kind,
            "-" if task.is_probe else f"{task.size:,}",
            f"{task.test_size:,}",
            "-" if task.is_probe else f"{found.steps[place]:,}",
            "-" if score is None else f"{100 * score:.0f} %",
        )
    return table


def _costs(found: Check, names: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    tasks = len(found.stream)
    parts = (
        f"training {duration(found.train_seconds)}, end of tasks {duration(found.pass_seconds)}, "
        f"scoring {duration(found.test_seconds)}"
    )
    where = f"{found.device}, 1 process" if found.world == 1 else f"{found.world} processes"
    remembered = f"{size(found.remembered_bytes)} after the first {found.remembered_rows} rows"
    if not found.remembered_rows:
        remembered = f"{size(found.remembered_bytes)} after two steps"
    rows = {
        "stream": f"{found.stream.name}, {found.stream.scenario}-incremental, {tasks} tasks",
        "model, strategy": names,
        "weights": f"{found.parameters:,}; {found.learning:,} learn, the strategy's own included",
        "device": where,
        "a step": f"{1000 * found.step_seconds:.1f} ms",
        "the run": f"about {duration(found.seconds)}: {parts}",
        "memory": _memory(found),
        "checkpoints": f"{tasks} x {size(found.task_bytes)}, and {size(found.last_bytes)} "
        "inside a task",
        "remembered": remembered,
    }
    for title, text in rows.items():
        table.add_row(title, text)
    return table


def _memory(found: Check) -> str:
    now = f"{size(found.peak_memory_bytes)} at most until now"
    if not found.test_bytes:
        return now
    return f"{now}; about {size(found.test_bytes)} to answer {found.test_batch} rows at once"


def duration(seconds: float) -> str:
    """Return seconds as a person says them: "0.4 s", "12 s", "3 min", "2.5 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return bytes as a person says them: "512 B", "3.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
