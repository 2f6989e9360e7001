"""Commands on the directory of a run: ``mmcl evaluate``, ``report``, ``compare`` and ``export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmcl.cli.parser import CommandParser, UsageError, refuse_renamed_options
from mmcl.cli.train import print_recalls, with_progress
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.run_files import (
    CLASSES,
    CONFUSION,
    EVALUATION,
    MATRIX,
    read_lenient,
)
from mmcl.export import FORMATS, default_format
from mmcl.export.start_weights import write_lineage
from mmcl.lightning.config.run_reference import RunReference, find_run_dir, finished_tasks
from mmcl.report import compare, matrix_csv, matrix_latex, matrix_table, write_report
from mmcl.report.equal_cost import COSTS, compare_at_equal


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate task checkpoints of a run on any task; writes evaluation/, not the run's matrix."""
    parser = _run_parser("mmcl evaluate", evaluate.__doc__)
    parser.add_argument(
        "--after_task",
        metavar="N",
        help="checkpoints: 0 = before training, 3 = after the third task; 0-5; 1,4 (all)",
    )
    parser.add_argument(
        "--tasks", metavar="N", help="tasks from 0, then eval-only tasks; 0-5; 1,4 (all)"
    )
    refuse_renamed_options(argv, {"--rows": "--after_task", "--columns": "--tasks"})
    given, rest = parser.parse_known_args(argv)
    run = RunReference(find_run_dir(given.run)).open(rest, "mmcl evaluate", with_progress)
    run.data.prepare_data()
    after_tasks = numbers(given.after_task, finished_tasks(run) + 1, "after_task")
    tasks = numbers(given.tasks, len(run.data.stream.all_tasks), "tasks")
    matrix = run.evaluate(after_tasks, tasks)
    if run.is_first:
        output = run.folder.path / EVALUATION
        lenient = read_lenient(matrix, output)
        print(matrix_table(matrix, lenient=lenient, width=Console().width))
        print_recalls(matrix, output)
        print(f"predictions: {output}")
    return 0


def report(argv: Sequence[str]) -> int:
    """Write report.html of a run, finished or not, and print its accuracy matrix."""
    parser = _run_parser("mmcl report", report.__doc__)
    parser.add_argument(
        "--as",
        dest="form",
        choices=("text", "csv", "latex"),
        default="text",
        help="format of the printed matrix (%(default)s)",
    )
    parser.add_argument(
        "--after_task",
        type=int,
        metavar="N",
        help="number of learned tasks for the classes and their confusion matrix (all)",
    )
    given = parser.parse_args(argv)
    folder = find_run_dir(given.run)
    matrix = AccuracyMatrix.read(folder / MATRIX)
    page = write_report(folder, given.after_task)
    if given.form == "text":
        print(matrix_table(matrix, lenient=read_lenient(matrix, folder)))
        print_recalls(matrix, folder)
        print(f"report: {page}")
        tables = [str(folder / name) for name in (CLASSES, CONFUSION) if (folder / name).is_file()]
        if tables:
            print(f"per class: {', '.join(tables)}")
    else:
        print({"csv": matrix_csv, "latex": matrix_latex}[given.form](matrix))
    return 0


def compare_runs(argv: Sequence[str]) -> int:
    """Compare runs of one stream: mean and deviation over seeds, as a table, a page and a plot."""
    parser = CommandParser(prog="mmcl compare", description=compare_runs.__doc__)
    parser.add_argument("runs", nargs="+", help="run directories, or names under runs/")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        help="folder of the results (%(default)s)",
    )
    parser.add_argument(
        "--at_equal",
        metavar="COST",
        help=f"compare when the runs had cost as much as the cheapest: {', '.join(COSTS)}; "
        "samples=5000 states the cost",
    )
    given = parser.parse_args(argv)
    folders = [find_run_dir(name) for name in given.runs]
    if given.at_equal:
        kind, has_budget, budget = given.at_equal.partition("=")
        equal = compare_at_equal(folders, kind, _amount(budget) if has_budget else None)
        equal.write(given.out)
        print(equal.text())
        print(f"plot and table: {given.out}")
        return 0
    found = compare(folders)
    found.write(given.out)
    print(found.text())
    print(f"plot and page: {given.out}")
    return 0


def export(argv: Sequence[str]) -> int:
    """Write the model of a run, after its last task or an earlier one, for another library."""
    parser = _run_parser("mmcl export", export.__doc__)
    parser.add_argument(
        "target", type=Path, help="new folder; for open_clip also a .safetensors file"
    )
    parser.add_argument(
        "--as", dest="form", choices=tuple(FORMATS),
        help="open_clip: folder for its local-dir:, or one file; transformers: folder of the full "
        "model, adapters merged; peft: folder of the adapter alone (what fits the model)",
    )  # fmt: skip
    parser.add_argument("--after_task", type=int, metavar="N", help="number of trained tasks (all)")
    parser.add_argument("--half", action="store_true", help="save in float16")
    refuse_renamed_options(argv, {"--after": "--after_task"})
    given, rest = parser.parse_known_args(argv)
    if given.target.exists():
        raise UsageError(f"{given.target} exists: give a new name, or remove this one")
    run = RunReference(find_run_dir(given.run)).open(rest, "mmcl export", with_progress)
    done, wanted = finished_tasks(run), given.after_task
    if wanted is not None and not 0 <= wanted <= done:
        raise UsageError(
            f"--after_task is {wanted}, and the run has trained {done} tasks: give 0 to {done}"
        )
    module = run.load_after(wanted)
    module.eval()
    form = given.form or default_format(module)
    if form == "open_clip" and given.target.suffix in (".bin", ".ckpt", ".npz", ".pt", ".pth"):
        raise UsageError(
            f"{given.target} does not end in .safetensors, by which open_clip knows such files: "
            "rename it, or give a folder"
        )
    print(FORMATS[form](module, given.target, half=given.half))
    write_lineage(run.folder.path, given.target, done if wanted is None else wanted)
    return 0


def _amount(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--at_equal has {text!r} behind the =: give a number") from None


def _run_parser(program: str, description: str | None) -> CommandParser:
    parser = CommandParser(prog=program, description=description)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    return parser


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
