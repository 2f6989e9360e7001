"""Training cost of a run: one entry per task, stored in ledger.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mmcl.core.atomic_write import write_atomic
from mmcl.evaluation import strict_json
from mmcl.evaluation.strict_json import Amount, Count


@dataclass(frozen=True)
class TaskCost:
    """Training cost of one task.

    Args:
        task: name of the task.
        seconds: wall time of training, evaluation not included.
        steps: optimizer steps.
        samples_new: training samples of the task, counted each time they are seen, all ranks.
        samples_replayed: replayed samples, counted each time they are seen, all ranks.
        flops: floating-point operations of training, None if not counted.
        peak_memory_bytes: peak device (or process) memory, None if not measured.
        trainable_parameters: parameters with a gradient during the task.
        parameters_added: parameters added for the task, 0 if it freed more.
        state_bytes: size of the strategy's state after the task, files included.
    """

    task: str
    seconds: Amount = 0.0
    steps: Count = 0
    samples_new: Count = 0
    samples_replayed: Count = 0
    flops: Amount | None = None
    peak_memory_bytes: Count | None = None
    trainable_parameters: Count = 0
    parameters_added: Count = 0
    state_bytes: Count = 0

    @property
    def memory_adjusted_flops(self) -> float | None:
        """FLOPs x GiB of peak memory, None if one of them is not known.

        Roth et al. 2024, arXiv:2408.14471, weight the FLOPs of a method by its peak device memory,
        so that a method that saves one at the cost of the other is not favored. Only ratios between
        runs on one kind of device mean something; on a CPU the memory is that of the process.
        """
        if self.flops is None or self.peak_memory_bytes is None:
            return None
        return self.flops * self.peak_memory_bytes / 2**30

    def merge(self, later: TaskCost) -> TaskCost:
        """Add the cost of a resumed run of a task to that of its interrupted run.

        Time, steps, samples and operations add up, the peak is the higher one; parameters and
        stored bytes are the later run's.

        Raises:
            ValueError: if the tasks differ.
        """
        if later.task != self.task:
            raise ValueError(f"merge got tasks {self.task!r} and {later.task!r}: give one task")
        mine, theirs = self.flops, later.flops
        peaks = self.peak_memory_bytes, later.peak_memory_bytes
        return replace(
            later,
            seconds=self.seconds + later.seconds,
            steps=self.steps + later.steps,
            samples_new=self.samples_new + later.samples_new,
            samples_replayed=self.samples_replayed + later.samples_replayed,
            flops=None if mine is None or theirs is None else mine + theirs,
            peak_memory_bytes=max((peak for peak in peaks if peak is not None), default=None),
        )


class Ledger:
    """Training costs of a run, one entry per task in the order in which they were first added.

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

    def add(self, cost: TaskCost) -> None:
        """Add a cost; it is merged with an entry of the same task, which was interrupted."""
        earlier = self._entries.get(cost.task)
        self._entries[cost.task] = cost if earlier is None else earlier.merge(cost)

    def put(self, cost: TaskCost) -> None:
        """Set a task's cost in place of its earlier entry."""
        self._entries[cost.task] = cost

    def total(self) -> TaskCost:
        """Total cost of all tasks; peak memory is the maximum, parameters and bytes the last.

        ``parameters_added`` adds up, since each task adds its own. A sum with an unknown term is
        unknown.
        """
        total = TaskCost("total", flops=0.0)
        for entry in self:
            added = total.parameters_added + entry.parameters_added
            total = replace(total.merge(replace(entry, task="total")), parameters_added=added)
        return total if len(self) else TaskCost("total")

    def write(self, path: Path) -> None:
        """Write ledger.json atomically.

        Raises:
            ValueError: if a number is not finite.
        """
        write_atomic(path, strict_json.to_bytes({"tasks": [asdict(entry) for entry in self]}))

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """Read ledger.json.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: naming all errors at once, if it is not a ledger.
        """
        entries = strict_json.load(_LedgerFile, strict_json.read(path), str(path)).tasks
        names = [entry.task for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError(f"{path} has two entries of one task: write it again")
        return cls(entries)


@dataclass(frozen=True)
class _LedgerFile:
    """Keys and types of ledger.json."""

    tasks: Sequence[TaskCost]
