"""``mmcl evaluate <run> --rows 3 --columns 0-5``: score kept checkpoints on any task."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from mmcl.commands.sequence import run_folder, with_progress
from mmcl.commands.words import CommandParser
from mmcl.lightning.cli import ContinualCLI
from mmcl.lightning.sequence import SequenceRun
from mmcl.metrics.leniency import read_lenient
from mmcl.report import matrix_table


def main(argv: Sequence[str]) -> int:
    """Score kept checkpoints of a run on any task; writes evaluation/, never the run's matrix."""
    parser = CommandParser(prog="mmcl evaluate", description=main.__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("--rows", help="0 = before training, 3 = after the third task; 0-5, 1,4")
    parser.add_argument("--columns", help="tasks from 0, then probes; 0-5, 1,4")
    given, rest = parser.parse_known_args(argv)
    folder = run_folder(given.run)
    cli = ContinualCLI(["--config", str(folder / "config.yaml"), *rest], program="mmcl evaluate")
    run = SequenceRun(
        cli.make_module, cli.make_trainer, with_progress(cli.make_data()), folder, seed=cli.seed
    )
    run.data.prepare_data()
    state = run.folder.state()
    rows = numbers(given.rows, (state.done if state else 0) + 1, "rows")
    columns = numbers(given.columns, len(run.data.stream.columns), "columns")
    matrix = run.evaluate(rows, columns)
    if run.is_first:
        kept = folder / "evaluation"
        lenient = read_lenient(matrix, kept)
        print(matrix_table(matrix, lenient=lenient, width=Console().width))
        print(f"answers: {kept}")
    return 0


def numbers(text: str | None, count: int, name: str) -> list[int]:
    """Read "3", "0-5" or "1,4-6" as numbers below ``count``; None = all.

    Raises:
        ValueError: if the text is something else or a number is too large.
    """
    if text is None:
        return list(range(count))
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        are_digits = first.isdigit() and (not dash or last.isdigit())
        if not are_digits or int(last or first) < int(first):
            raise ValueError(f"--{name} is {text!r}: give numbers such as 3, 0-5 or 1,4")
        found += range(int(first), int(last or first) + 1)
    wrong = [number for number in found if number >= count]
    if wrong:
        raise ValueError(f"--{name} asks for {wrong}, and the run has 0 to {count - 1}")
    return sorted(set(found))
