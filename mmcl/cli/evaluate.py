"""``mmcl evaluate <run> --after_task 3 --tasks 0-5``: evaluate task checkpoints on any task."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.cli.train import run_folder, with_progress
from mmcl.evaluation.run_files import CONFIG, EVALUATION, read_lenient
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.continual_run import ContinualRun
from mmcl.report import matrix_table

_RENAMED_OPTIONS = {"--rows": "--after_task", "--columns": "--tasks"}


def main(argv: Sequence[str]) -> int:
    """Evaluate task checkpoints of a run on any task; writes evaluation/, not the run's matrix."""
    parser = CommandParser(prog="mmcl evaluate", description=main.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument(
        "--after_task",
        metavar="N",
        help="checkpoints: 0 = before training, 3 = after the third task; 0-5; 1,4 (all)",
    )
    parser.add_argument(
        "--tasks", metavar="N", help="tasks from 0, then eval-only tasks; 0-5; 1,4 (all)"
    )
    given, rest = parser.parse_known_args(argv)
    _refuse_renamed_options(rest)
    folder = run_folder(given.run)
    cli = ContinualCLI(["--config", str(folder / CONFIG), *rest], program="mmcl evaluate")
    run = ContinualRun(
        cli.make_module, cli.make_trainer, with_progress(cli.make_data()), folder, seed=cli.seed
    )
    run.data.prepare_data()
    state = run.folder.state()
    after_tasks = numbers(
        given.after_task, (state.finished_tasks if state else 0) + 1, "after_task"
    )
    tasks = numbers(given.tasks, len(run.data.stream.all_tasks), "tasks")
    matrix = run.evaluate(after_tasks, tasks)
    if run.is_first:
        output = folder / EVALUATION
        lenient = read_lenient(matrix, output)
        print(matrix_table(matrix, lenient=lenient, width=Console().width))
        print(f"predictions: {output}")
    return 0


def _refuse_renamed_options(words: Sequence[str]) -> None:
    for word in words:
        old = word.partition("=")[0]
        if old in _RENAMED_OPTIONS:
            raise UsageError(f"the option {old} is called {_RENAMED_OPTIONS[old]} now")


def numbers(text: str | None, count: int, name: str) -> list[int]:
    """Parse numbers below ``count`` such as "3", "0-5" or "1,4-6"; None = all.

    Raises:
        ValueError: if the text has another form or a number is too large.
    """
    if text is None:
        return list(range(count))
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        are_digits = first.isdigit() and (not dash or last.isdigit())
        if not are_digits or int(last or first) < int(first):
            raise ValueError(f"--{name} is {text!r}: give numbers such as 3, 0-5 or 1,4")
        found += range(int(first), int(last or first) + 1)
    wrong = [number for number in found if number >= count]
    if wrong:
        raise ValueError(f"--{name} has {wrong}: give 0 to {count - 1}")
    return sorted(set(found))
