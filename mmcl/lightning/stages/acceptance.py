"""Acceptance of tasks by gates, and rollback of a run to an earlier task."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mmcl.core import TaskStream
from mmcl.data.shards.replay_copies import released_tasks
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.cost import Ledger
from mmcl.evaluation.gates import Gate, GateResult, check_gates
from mmcl.evaluation.run_files import LEDGER, MATRIX
from mmcl.lightning.run_dir import RunDirectory, RunState

ASIDE = "rolled_back"
"""Folder of a run with what rollbacks moved aside."""


class GateBroken(RuntimeError):
    """Error of a run whose last task breaks a gate; its exit status is 3.

    Args:
        task: name of that task.
        broken: results of the limits that are not kept.
        folder: run directory.
        matrix: of the run.
    """

    exit_status = 3

    def __init__(
        self, task: str, broken: list[GateResult], folder: Path, matrix: AccuracyMatrix
    ) -> None:
        self.matrix = matrix
        reasons = "; ".join(result.sentence for result in broken)
        super().__init__(
            f"task '{task}' is not accepted ({reasons}). Its checkpoint is kept. Accept it with "
            f"mmcl accept {folder}, or go back with mmcl rollback {folder} --to N and give the "
            "command with other settings; the same command checks the gates again"
        )


def expect_gates_kept(
    gates: Sequence[Gate], matrix: AccuracyMatrix, folder: RunDirectory, state: RunState,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Accept the last finished task of a run if it keeps the gates.

    Args:
        gates: known, see ``expect_known``.
        matrix: of the run, with the task's row.
        folder: run directory.
        state: of the run; changed and written if the task is accepted.
        log: receives a line on what was compared.

    Raises:
        GateBroken: if a limit is not kept and the task was not accepted by hand.
    """
    row = state.finished_tasks
    if not gates or row <= state.accepted_tasks:
        return
    results, name = check_gates(gates, matrix, row), matrix.rows[row]
    not_compared = [each.sentence for each in results if each.is_kept is None]
    for sentence in not_compared:
        log(f"gate not compared after '{name}': {sentence}")
    broken = [each for each in results if each.is_kept is False]
    if broken:
        raise GateBroken(name, broken, folder.path, matrix)
    log(f"gates after '{name}': {len(results) - len(not_compared)} kept")
    state.accepted_tasks = row
    folder.save(state)


def accept(folder: RunDirectory, state: RunState) -> None:
    """Accept the last finished task of a run, whatever its gates say."""
    state.accepted_tasks = state.finished_tasks
    state.warnings.append(
        f"task {state.finished_tasks - 1} was accepted by hand, whatever its gates say"
    )
    folder.save(state)


def planned_moves(folder: RunDirectory, tasks: int) -> list[Path]:
    """Return the files of a run that belong to tasks after the first ``tasks``."""
    found = [
        path
        for kind in ("task", "constant")
        for path in sorted(folder.checkpoints.glob(f"{kind}_*.ckpt"))
        if path.stem.rpartition("_")[2].isdigit() and int(path.stem.rpartition("_")[2]) >= tasks
    ]
    found += sorted(folder.checkpoints.glob("last*.ckpt"))
    for row in sorted((folder.path / "answers").glob("row_*")):
        if row.name.rpartition("_")[2].isdigit() and int(row.name.rpartition("_")[2]) > tasks:
            found.append(row)
    for name in ("summary.json", "report.html"):
        found += [path for path in [folder.path / name] if path.exists()]
    return found


def roll_back(folder: RunDirectory, stream: TaskStream, state: RunState, tasks: int) -> list[Path]:
    """Set a run back to its state after fewer tasks; what came after is moved aside.

    A rollback that was killed is finished by another one to the same task. The order of its steps
    lets no score of a later task be taken for one of a task that is trained again.

    Args:
        folder: run directory, locked.
        stream: of the run.
        state: of the run; changed.
        tasks: trained tasks that stay, 0 to all.

    Returns:
        the files that were moved.

    Raises:
        ValueError: if a task to train again has lost its shards.
    """
    gone = [i for i in released_tasks(stream, folder.path / "memory") if i >= tasks]
    if gone:
        raise ValueError(
            f"task '{stream[gone[0]].name}' cannot be trained again, because its shards are gone: "
            f"restore them, or roll back to {gone[-1] + 1} or more"
        )
    if (folder.path / MATRIX).is_file():
        matrix = AccuracyMatrix.read(folder.path / MATRIX)
        for row in range(tasks + 1, len(matrix.rows)):
            for column in range(len(matrix.columns)):
                matrix.set(row, column, None)
        matrix.write(folder.path / MATRIX)
    kept = {task.name for task in stream.tasks[:tasks]}
    ledger = folder.path / LEDGER
    costs = [c for c in Ledger.read(ledger) if c.task in kept] if ledger.is_file() else []
    dropped = [f"task '{task.name}'" for task in stream.tasks[tasks:]]
    state.warnings = [w for w in state.warnings if not w.startswith(tuple(dropped))]
    state.finished_tasks = state.task = tasks
    state.tasks = state.tasks[:tasks]
    state.steps = sum(max(1, cost.steps) for cost in costs)
    state.last_checkpoint, state.step, state.branch_step = None, 0, 0
    state.accepted_tasks = min(state.accepted_tasks, tasks)
    state.may_change = True
    folder.save(state)
    if ledger.is_file():
        Ledger(costs).write(ledger)
    return _move_aside(folder, planned_moves(folder, tasks))


def _move_aside(folder: RunDirectory, paths: list[Path]) -> list[Path]:
    if not paths:
        return []
    root = folder.path / ASIDE
    number = 1 + max((int(p.name) for p in root.glob("*") if p.name.isdigit()), default=0)
    target = root / f"{number:02d}"
    for path in paths:
        place = target / path.relative_to(folder.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)
    return paths
