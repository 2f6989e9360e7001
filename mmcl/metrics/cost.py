"""What a run cost: one entry per task, kept in ledger.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mmcl.core.atomic import write_atomic
from mmcl.metrics import jsontext


@dataclass(frozen=True)
class TaskCost:
    """The cost of one task.

    Args:
        task: its name.
        seconds: wall time of training, evaluation not included.
        steps: optimiser steps.
        samples_new: training samples of the task that were seen, each time counted, all ranks.
        samples_recalled: replayed samples that were seen, each time counted, all ranks.
        flops: floating-point operations of training, None if not counted.
        peak_memory_bytes: highest use of device (or process) memory, None if not measured.
        trainable_parameters: parameters with a gradient during the task.
        parameters_added: parameters that came with the task.
        bytes_remembered: what the strategy keeps after the task, files included.
    """

    task: str
    seconds: float = 0.0
    steps: int = 0
    samples_new: int = 0
    samples_recalled: int = 0
    flops: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int = 0
    parameters_added: int = 0
    bytes_remembered: int = 0

    def merge(self, later: TaskCost) -> TaskCost:
        """Join the cost of a part that was interrupted with that of the part that went on.

        Time, steps, samples and operations add up, the peak is the higher one, and what describes
        the state of things (parameters, bytes remembered) is the later part's.

        Raises:
            ValueError: if the parts are of different tasks.
        """
        if later.task != self.task:
            raise ValueError(f"merge got tasks {self.task!r} and {later.task!r}: give one task")
        return replace(
            later,
            seconds=self.seconds + later.seconds,
            steps=self.steps + later.steps,
            samples_new=self.samples_new + later.samples_new,
            samples_recalled=self.samples_recalled + later.samples_recalled,
            flops=_sum([self.flops, later.flops]),
            peak_memory_bytes=_highest([self.peak_memory_bytes, later.peak_memory_bytes]),
        )


_WHOLE = (
    "steps",
    "samples_new",
    "samples_recalled",
    "trainable_parameters",
    "parameters_added",
    "bytes_remembered",
)
_KEYS = tuple(field.name for field in fields(TaskCost))


class Ledger:
    """The costs of a run, one entry per task in the order in which they were first added.

    Args:
        entries: costs to start with; two of one task are merged.
    """

    def __init__(self, entries: Iterable[TaskCost] = ()) -> None:
        self._entries: dict[str, TaskCost] = {}
        for entry in entries:
            self.add(entry)

    def __iter__(self) -> Iterator[TaskCost]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, task: str) -> TaskCost | None:
        """Give a task's cost, None if it has no entry."""
        return self._entries.get(task)

    def add(self, cost: TaskCost) -> None:
        """Enter a cost; a task that has an entry was interrupted, and the parts are merged."""
        earlier = self._entries.get(cost.task)
        self._entries[cost.task] = cost if earlier is None else earlier.merge(cost)

    def put(self, cost: TaskCost) -> None:
        """Enter a cost in place of the task's earlier entry."""
        self._entries[cost.task] = cost

    def total(self) -> TaskCost:
        """Sum over the tasks; peak memory is the highest, parameters and bytes are the last's.

        ``parameters_added`` adds up, since each task adds its own. A sum with an unknown part is
        unknown.
        """
        whole = TaskCost("total", flops=0.0)
        for entry in self:
            added = whole.parameters_added + entry.parameters_added
            whole = replace(whole.merge(replace(entry, task="total")), parameters_added=added)
        return whole if len(self) else TaskCost("total")

    def write(self, path: Path) -> None:
        """Write ledger.json, all of it or nothing.

        Raises:
            ValueError: if a number is not finite.
        """
        write_atomic(path, jsontext.to_bytes({"tasks": [asdict(entry) for entry in self]}))

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read ledger.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming the entry, if it is not a ledger.
        """
        raw = jsontext.parse(jsontext.read_text(path), str(path))
        if not isinstance(raw, dict) or not isinstance(raw.get("tasks"), list):
            raise ValueError(f"{path} is no ledger: expected an object with a list 'tasks'")
        entries = [
            _cost(entry, f"{path} entry {number}") for number, entry in enumerate(raw["tasks"], 1)
        ]
        names = [entry.task for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"{path} has two entries of one task: write it anew")
        return cls(entries)


def _cost(raw: object, place: str) -> TaskCost:
    if not isinstance(raw, dict) or set(raw) != set(_KEYS):
        raise ValueError(f"{place} is no cost of a task: expected {', '.join(_KEYS)}")
    faults = [key for key in _KEYS if not _is_good(key, raw[key])]
    if faults:
        raise ValueError(f"{place}: {faults[0]!r} is {raw[faults[0]]!r}, which it cannot be")
    return TaskCost(**{key: raw[key] for key in _KEYS})


def _is_good(key: str, value: Any) -> bool:
    if key == "task":
        return isinstance(value, str)
    if key in _WHOLE:
        return jsontext.is_count(value)
    if key == "peak_memory_bytes":
        return value is None or jsontext.is_count(value)
    if value is None:
        return key == "flops"
    return jsontext.is_number(value) and value >= 0


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _highest(parts: list[int | None]) -> int | None:
    return max((part for part in parts if part is not None), default=None)
