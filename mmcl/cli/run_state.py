"""Commands on the state of a run: ``mmcl gate``, ``accept``, ``rollback`` and ``lineage``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mmcl.cli.parser import CommandParser, UsageError
from mmcl.data.remote.location import sha256_of
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.gates import GateResult, check_gates, expect_known, read_gates
from mmcl.evaluation.run_files import CONFIG, MATRIX, read_lenient
from mmcl.lightning.config.run_reference import RunReference, find_run_dir
from mmcl.lightning.run_dir import RunDirectory, RunState
from mmcl.lightning.stages.acceptance import ASIDE, GateBroken, accept, planned_moves, roll_back
from mmcl.lightning.stages.lineage import LINEAGE, Lineage

_MAX_DEPTH, _WIDTH = 50, 500
_WORDS = {True: "kept", False: "BROKEN", None: "not compared"}


def gate(argv: Sequence[str]) -> int:
    """Compare a run with gates: its own, or those of a file; exit status 3 if one is broken."""
    parser = CommandParser(prog="mmcl gate", description=gate.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument("--gates", type=Path, metavar="FILE", help="YAML list of gates (the run's)")
    parser.add_argument(
        "--after_task", type=int, metavar="N", help="number of trained tasks (the last measured)"
    )
    parser.add_argument("--lenient", action="store_true", help="compare the lenient scores")
    given = parser.parse_args(argv)
    folder = find_run_dir(given.run)
    matrix = AccuracyMatrix.read(folder / MATRIX)
    if given.lenient:
        lenient = read_lenient(matrix, folder)
        if lenient is None:
            raise UsageError(f"{folder} has no lenient scores: leave --lenient out")
        matrix = lenient
    row = matrix.last_row if given.after_task is None else given.after_task
    if row is None or not 1 <= row <= matrix.tasks:
        raise UsageError(f"--after_task is {row}: give 1 to {matrix.tasks} trained tasks")
    gates = read_gates(given.gates or folder / CONFIG)
    expect_known(gates, matrix)
    results = check_gates(gates, matrix, row)
    _print_table(results, f"after '{matrix.rows[row]}'")
    return GateBroken.exit_status if any(each.is_kept is False for each in results) else 0


def accept_task(argv: Sequence[str]) -> int:
    """Accept the last task of a run that a broken gate stopped; the same command trains on."""
    parser = CommandParser(prog="mmcl accept", description=accept_task.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    folder = RunDirectory(find_run_dir(parser.parse_args(argv).run))
    with folder.lock():
        state = _state(folder)
        if state.accepted_tasks >= state.finished_tasks:
            print(f"all {state.finished_tasks} tasks are accepted")
            return 0
        accept(folder, state)
    print(f"accepted: task {state.finished_tasks - 1}")
    return 0


def rollback(argv: Sequence[str]) -> int:
    """Set a run back to its state after fewer tasks; what came after is moved aside."""
    parser = CommandParser(prog="mmcl rollback", description=rollback.__doc__)
    parser.add_argument("run", help="run directory, or a run's name under runs/")
    parser.add_argument(
        "--to", required=True, metavar="N|TASK", help="trained tasks that stay, or the last of them"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what would be moved")
    given = parser.parse_args(argv)
    path = find_run_dir(given.run)
    reference = RunReference(path, given.to)
    run = reference.open(program="mmcl rollback")
    run.data.prepare_data()
    stream = run.data.declared_stream
    with run.folder.lock():
        state = _state(run.folder)
        tasks = reference.finished_tasks(run)
        again = ", ".join(f"'{task.name}'" for task in stream.tasks[tasks : len(state.tasks)])
        if given.dry_run:
            for file in planned_moves(run.folder, tasks):
                print(f"would move {file}")
            print(f"to be trained again: {again or 'nothing'}")
            return 0
        moved = roll_back(run.folder, stream, state, tasks)
    print(f"rolled back to {tasks} trained tasks; to be trained again: {again or 'nothing'}")
    if moved:
        print(f"{len(moved)} files were moved to {path / ASIDE}: remove it when you need no more")
    return 0


def lineage(argv: Sequence[str]) -> int:
    """Print where a run or an export comes from: base weights, stages, tasks, checkpoints."""
    parser = CommandParser(prog="mmcl lineage", description=lineage.__doc__)
    parser.add_argument("path", help="run directory or its name, folder of an export, or its file")
    parser.add_argument("--verify", action="store_true", help="hash the checkpoints again")
    given = parser.parse_args(argv)
    file = _lineage_file(given.path)
    tree = Tree(Text(str(file.parent if file.name == LINEAGE else given.path)))
    _add_lineage(tree, file, Lineage.read(file), verify=given.verify)
    # Wide enough for any path: a line that is broken cannot be copied.
    Console(highlight=False, markup=False, width=_WIDTH).print(tree, crop=False)
    return 0


def _lineage_file(given: str) -> Path:
    path = Path(given)
    beside = path.with_name(f"{path.name}.{LINEAGE}")
    if path.is_file() and beside.is_file():
        return beside
    folder = path if (path / LINEAGE).is_file() else find_run_dir(given)
    if not (folder / LINEAGE).is_file():
        raise UsageError(
            f"{folder} has no {LINEAGE}: runs and exports of earlier versions have none"
        )
    return folder / LINEAGE


def _add_lineage(tree: Tree, file: Path, found: Lineage, depth: int = 0, *, verify: bool) -> None:
    """Add the links of a lineage, those of the run that it starts from first."""
    if found.weights_sha256:
        tree.add(Text(f"exported weights {found.weights_sha256[:12]} of run {found.run}"))
    base = tree.add(Text(f"base {found.model} {found.base_sha256[:12]}"))
    if found.start is not None:
        start = found.start
        other = Path(start.run) / LINEAGE
        title = f"start: {start.run} after {start.tasks} tasks"
        if not other.is_file():
            base.add(Text(f"{title}; the run is gone"))
        elif depth < _MAX_DEPTH:
            earlier = Lineage.read(other).after(start.tasks)
            is_same = not start.lineage_sha256 or sha256_of(other) == start.lineage_sha256
            note = "" if is_same else "; its lineage has changed since"
            link = base.add(Text(f"{title}{note}"))
            _add_lineage(link, other, earlier, depth + 1, verify=verify)
    for task in found.tasks:
        checkpoint = file.parent / "checkpoints" / task.checkpoint
        state = f"{task.checkpoint} {task.sha256[:12]}"
        if verify and checkpoint.is_file() and sha256_of(checkpoint) != task.sha256:
            state += ", which is another file now"
        elif not checkpoint.is_file() and not found.run:
            state += ", which is gone"
        tree.add(Text(f"{task.stage}  {task.task}: {state}"))


def _state(folder: RunDirectory) -> RunState:
    state = folder.state()
    if state is None:
        raise UsageError(f"{folder.path} has no run.json: it was not started")
    return state


def _print_table(results: Sequence[GateResult], title: str) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("gate", "measured", "limit", ""):
        table.add_column(name, overflow="fold")
    for each in results:
        table.add_row(each.subject, each.measured, each.limit, _WORDS[each.is_kept])
    console = Console(highlight=False, markup=False)
    console.print(title)
    console.print(table)
