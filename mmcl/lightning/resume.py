"""Resume of a run: its data is compared, its checkpoints are loaded, a lost one is made again.

After running out of memory it resumes with settings that need less; ``memory_advice`` names them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmcl.core import Task, TaskStream
from mmcl.data.shards.shard_content import SPLITS, ShardContent, content_change, task_content
from mmcl.evaluation import AccuracyMatrix
from mmcl.evaluation.cost import Ledger
from mmcl.lightning.checkpoints.checkpoint_checks import LostCheckpoint, check_whole
from mmcl.lightning.checkpoints.checkpoint_state import check_state
from mmcl.lightning.datamodule import ContinualDataModule
from mmcl.lightning.module import ContinualModule
from mmcl.lightning.run_dir import RunDirectory, RunState


def check_data(
    folder: RunDirectory, data: ContinualDataModule, state: RunState, measured: Collection[str]
) -> None:
    """Check that a run's data is that of its earlier starts, and store what is known of it.

    Data may be moved and shards renamed. What is not yet trained on or measured may change.

    Args:
        folder: run directory with ``inputs.json``.
        data: datamodule of the stream.
        state: state of the run.
        measured: tasks and eval-only tasks with a cell in the accuracy matrix.

    Raises:
        ValueError: naming the first task that differs, and how.
    """
    inputs = folder.inputs()
    stored: Mapping[str, Mapping[str, Any]] = inputs["tasks"]
    declared = data.declared_stream
    facts = {name: entry["facts"] for name, entry in stored.items()}
    check_stream_extends(state, declared, facts)
    started = {task.name for task in declared[: len(state.tasks)]}
    tasks = {}
    for task in declared.all_tasks:
        name, before = task.name, stored.get(task.name, {})
        now: dict[str, Any] = task_content(data.prepared, task)
        reader = data.prepared.readers.get((task.index, "train"))
        if reader is not None:
            # The order of samples is the one of the first start, also where the shards have moved.
            in_windows = before.get("in_windows")
            if in_windows is not None and (in_windows or name in started):
                reader.in_windows = in_windows
            now["in_windows"] = reader.in_windows
        used = SPLITS if name in started else ("test",) if name in measured else ()
        for split in used:
            if split in before and split in now:
                now[split] = _same_content(before[split], now[split], name, split, name in started)
        kept = before if name in started else {}
        tasks[name] = {**kept, **now, "facts": task_facts(declared, task)}
    folder.save_inputs({**inputs, "tasks": tasks})
    folder.save_moved_paths()


def _same_content(
    before: Sequence[ShardContent],
    now: Sequence[ShardContent],
    task: str,
    split: str,
    is_trained: bool,
) -> list[ShardContent]:
    """Return all that is known of the shards of a split; a ValueError if they changed."""
    change = content_change(before, now)
    if change:
        raise ValueError(
            f"the data of task '{task}' ({split}) is not what this run was "
            f"{'trained' if is_trained else 'measured'} on: {change}. Restore it, or use another "
            "--run_name"
        )
    return [{**old, **new} for old, new in zip(before, now, strict=True)]


def load_state(module: ContinualModule, file: Path) -> None:
    """Load a task checkpoint into a module for which the same tasks were begun.

    Raises:
        LostCheckpoint: if the checkpoint is missing or damaged.
        ValueError: if it holds pickled objects, or belongs to another model or strategy.
    """
    check_whole(file)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can raise anything
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}): it is broken or holds pickled "
            "objects, which are never run; restore the file, or remove the run directory"
        ) from error
    check_state(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)


def check_memory_files(module: ContinualModule, checkpoint: Path) -> None:
    """Check that the stored rows which a strategy's state names are on the disk.

    Raises:
        LostCheckpoint: naming the checkpoint of that state, from which no task can be trained.
    """
    for part in module.strategy.modules():
        missing: list[Path] = getattr(part, "missing_files", list)()
        if missing:
            raise LostCheckpoint(checkpoint, f"needs {missing[0]}, which is missing or damaged")


def set_back(
    folder: RunDirectory,
    data: ContinualDataModule,
    state: RunState,
    matrix: AccuracyMatrix,
    tasks: int,
    lost: LostCheckpoint,
) -> None:
    """Set a run back to its state after fewer tasks, and warn of what is trained again.

    Args:
        folder: run directory; the changed files are written.
        data: datamodule of the stream.
        state: state of the run; changed.
        matrix: accuracy matrix; rows of the tasks to train again are emptied.
        tasks: number of tasks that stay finished; 0 to ``state.finished_tasks``.
        lost: the reason.

    Raises:
        ValueError: if the training shards of a task to train again were released.
    """
    end = state.finished_tasks + (state.last_checkpoint is not None)
    again = data.stream.tasks[tasks:end]
    gone = [task.name for task in again if task.index in data.released_tasks]
    if gone:
        raise ValueError(
            f"{lost.reason}, and task '{gone[0]}' cannot be trained again without its shards: "
            "restore the checkpoint or the shards"
        )
    names = ", ".join(f"'{task.name}'" for task in again)
    warnings.warn(f"{lost.reason}: trained again from the beginning: {names}", stacklevel=2)
    if tasks < state.finished_tasks:
        for row in range(tasks + 1, len(matrix.rows)):
            for column in range(len(matrix.columns)):
                matrix.set(row, column, None)
        kept, file = {task.name for task in data.stream.tasks[:tasks]}, folder.path / "ledger.json"
        costs = Ledger(c for c in Ledger.read(file) if c.task in kept) if file.is_file() else ()
        # A closed-form strategy takes one idle step, which is no cost.
        state.steps = sum(max(1, cost.steps) for cost in costs)
        if folder.writes:
            matrix.write(folder.path / "matrix.json")
            Ledger(costs).write(file)
    dropped = [f"task '{task.name}':" for task in again]
    state.warnings = [w for w in state.warnings if not any(words in w for words in dropped)]
    state.finished_tasks = state.task = tasks
    state.last_checkpoint, state.step, state.branch_step = None, 0, 0
    if folder.writes:
        folder.save(state)


def note_changes(folder: RunDirectory, state: RunState, stream: TaskStream) -> None:
    """Note changed settings in the run's warnings, with the step that they begin at.

    Not for a finished run, which trains nothing with them.
    """
    if folder.changes and state.finished_tasks < len(stream):
        where = state.resume_point()
        state.warnings += [f"{change}, and the run resumed {where}" for change in folder.changes]
        is_smaller = any("batch" in change.partition(" ")[0] for change in folder.changes)
        if is_smaller and any(task.task_type in ("captioning", "retrieval") for task in stream):
            state.warnings.append(
                "a contrastive loss compares the captions of a micro-batch, so its value changed "
                f"too where the run resumed {where}"
            )
        folder.changes = []
        state.may_change = False
        folder.save(state)
        folder.save_moved_paths()


def task_fingerprint(stream: TaskStream, task: Task) -> str:
    """Return a fingerprint of a task: a hash of its data and prompts, a blank, and its name."""
    shards = {name: stream.hashes.get(name, "") for name in (*task.train, *task.test)}
    facts = [
        task.name, task.task_type, task.classes, task.class_ids, task.templates, task.text_field,
        task.size, task.test_size, task.epochs, shards, stream.scenario,
    ]  # fmt: skip
    if task.replay_ratio is not None or task.mixture:
        sources = [(stream.sources[i - 1].name, fraction) for i, fraction in task.mixture]
        facts.append([task.replay_ratio, sources])
    members = (task.image_field, task.label_field, task.key_until, task.ignore_members)
    if members != (Task.image_field, Task.label_field, Task.key_until, Task.ignore_members):
        facts.append(members)
    if named := [stream.class_names[name] for name in task.classes if name in stream.class_names]:
        facts.append(named)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{digest} {task.name}"


def task_facts(stream: TaskStream, task: Task) -> str:
    """Return the fingerprint of a task without its shards, which may be moved."""
    return task_fingerprint(stream, replace(task, train=(), test=(), size=0, test_size=0))


def check_stream_extends(
    state: RunState, stream: TaskStream, facts: Mapping[str, str] | None = None
) -> None:
    """Check that the stream starts with the tasks that the run was trained on.

    Args:
        state: state of the run.
        stream: as its card declares it now.
        facts: task -> its stored ``task_facts``; the shards of these tasks are compared elsewhere.

    Raises:
        ValueError: naming the first task that differs.
    """
    names, facts = [task.name for task in stream], facts or {}
    for index, fingerprint in enumerate(state.tasks):
        name = fingerprint.partition(" ")[2]
        if name in names[index : index + 1]:
            now = (task_facts if name in facts else task_fingerprint)(stream, stream[index])
            if now == facts.get(name, fingerprint):
                continue
        if name not in names:
            raise ValueError(
                f"task {index} ('{name}'), which this run was trained on, is not on the card: "
                "tasks can be appended to a card, not removed; put it back, or use another "
                "--run_name"
            )
        raise ValueError(
            f"task {index} ('{name}') is not the one this run was trained on: its position, data, "
            "classes or templates changed; append new tasks at the end, or use another --run_name"
        )
