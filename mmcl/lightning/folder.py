"""RunFolder: where a run stands on disk, and whether it is the run that was asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmcl.core import Task, TaskStream, write_atomic
from mmcl.lightning.holding import held

# What may differ between two starts of one run: where and how fast, not what is computed.
FREE_KEYS = (
    "config", "name", "runs", "trainer.accelerator", "trainer.devices", "trainer.num_nodes",
    "trainer.strategy", "trainer.logger", "trainer.callbacks", "trainer.profiler",
    "trainer.log_every_n_steps", "trainer.default_root_dir", "data.root", "data.workers",
    "data.test_batch", "data.verify_hashes", "data.max_faults",
    "data.cache", "data.cache_limit", "save_every_steps",
)  # fmt: skip


@dataclass
class RunState:
    """What ``run.json`` holds.

    Attributes:
        done: tasks whose training ended and whose checkpoint is written.
        task: the task in training, equal to ``done``.
        tasks: one mark for each task that was begun, its name last.
        seed: of the run.
        last: mid-task checkpoint to go on from, relative to the folder, or None.
        step: optimiser step of ``last`` inside its task.
        seconds: wall time of earlier starts.
        warnings: sentences for the summary.
        steps: optimiser steps of the finished tasks.
        faults: bad samples that were met.
    """

    done: int
    task: int
    tasks: list[str]
    seed: int
    last: str | None = None
    step: int = 0
    seconds: float = 0.0
    steps: int = 0
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def step_offset(self, step: int) -> int:
        """Return the step count of the whole run at a step of the present task."""
        return self.steps + step

    def where(self) -> str:
        """Say from where the run goes on, as what follows "goes on"."""
        names = [mark.partition(" ")[2] for mark in self.tasks]
        if self.last is not None:
            return f"in task {self.done} ('{names[self.done]}') at step {self.step}"
        return f"after task {self.done - 1} ('{names[self.done - 1]}')" if self.done else "anew"


class RunFolder:
    """A run directory.

    Args:
        path: the directory.
        writes: False on ranks that must leave files to rank 0.
    """

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._is_held = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other starts of the run out, see ``held``; inside of itself it does nothing.

        Raises:
            OSError: if the folder cannot be written to.
            RuntimeError: if another process holds it.
        """
        if self._is_held or not self.writes:
            yield
            return
        with held(self.path):
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False

    @property
    def last(self) -> Path:
        """The mid-task checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    def after(self, tasks: int) -> Path:
        """Return the checkpoint kept after so many tasks."""
        return self.path / "checkpoints" / f"task_{tasks - 1:02d}.ckpt"

    def state(self) -> RunState | None:
        """Read ``run.json``; None where no run was begun.

        Raises:
            ValueError: if the file is not ours.
        """
        file = self.path / "run.json"
        if not file.is_file():
            return None
        try:
            state = RunState(**json.loads(file.read_text(encoding="utf-8")))
            _expect_state(state)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not the state of a run ({error}): move it away") from None
        return state

    def save(self, state: RunState) -> None:
        """Write ``run.json``."""
        self.write("run.json", json.dumps(asdict(state), indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, on rank 0."""
        if self.writes:
            write_atomic(self.path / name, text)

    def claim(self, config: Mapping[str, Any]) -> None:
        """Keep the configuration, or check that the folder was made with the same.

        A folder in which nothing was scored or learned yet takes any configuration.

        Raises:
            ValueError: naming up to five settings that differ.
        """
        file = self.path / "config.yaml"
        has_results = any((self.path / name).exists() for name in ("run.json", "matrix.json"))
        if file.is_file() and has_results:
            there = flat(_config(file))
            here = flat(json.loads(json.dumps(config, default=str)))
            keys = sorted(k for k in there.keys() | here.keys() if not _is_free(k))
            differ = [k for k in keys if there.get(k) != here.get(k)]
            if differ:
                named = "; ".join(
                    f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in differ[:5]
                )
                raise ValueError(
                    f"{self.path} holds a run with another configuration: {named}. Give this run "
                    "another --name, or remove the folder"
                )
        elif has_results:
            raise ValueError(f"{self.path} holds a run without its config.yaml: use another --name")
        else:
            plain = json.loads(json.dumps(config, default=str))
            self.write("config.yaml", yaml.safe_dump(plain, sort_keys=False))


def _expect_state(state: RunState) -> None:
    counts = (state.done, state.task, state.step, state.steps)
    is_good = all(type(count) is int and count >= 0 for count in counts)
    is_good = is_good and isinstance(state.last, str | None)
    for listed in (state.tasks, state.warnings, state.faults):
        is_good = is_good and isinstance(listed, list) and all(isinstance(t, str) for t in listed)
    if not is_good or len(state.tasks) < state.done:
        raise ValueError("a field of it is of another kind than was written")
    if state.last is not None and not _is_inside(state.last):
        raise ValueError("it goes on from a checkpoint outside of its folder")


def _is_inside(name: str) -> bool:
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _config(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} is not the configuration of a run ({reason}): restore it, or use another "
            "--name"
        ) from None


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def task_mark(stream: TaskStream, task: Task) -> str:
    """Return the mark of a task: a hash of its data and of how it is asked, a blank, its name."""
    shards = {name: stream.hashes.get(name, "") for name in (*task.train, *task.test)}
    facts = [
        task.name, task.kind, task.classes, task.labels, task.templates, task.text, task.size,
        task.test_size, task.epochs, shards, stream.scenario,
    ]  # fmt: skip
    if task.share is not None or task.mix:
        sources = [(stream.sources[number - 1].name, share) for number, share in task.mix]
        facts.append([task.share, sources])
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"{digest} {task.name}"


def check_grown(state: RunState, stream: TaskStream) -> None:
    """Check that the stream begins with the tasks that the run has learned.

    Raises:
        ValueError: naming the first task that is another.
    """
    marks = [task_mark(stream, task) for task in stream]
    for place, mark in enumerate(state.tasks):
        if place < len(marks) and marks[place] == mark:
            continue
        learned = mark.partition(" ")[2]
        if learned not in [task.name for task in stream]:
            raise ValueError(
                f"task {place} ('{learned}'), which this run learned, is not on the card: tasks "
                "can be appended to a card, not removed; put it back, or use another --name"
            )
        raise ValueError(
            f"task {place} ('{learned}') is not the one this run learned: its place, data, "
            "classes or templates changed; append new tasks at the end, or use another --name"
        )
