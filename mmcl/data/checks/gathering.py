"""Puts together what was found in the shards of a stream; told of them in the card's order."""

from __future__ import annotations

from mmcl.core import Task, TaskStream
from mmcl.data.checks.findings import (
    PartFindings,
    StreamFindings,
    TaskFindings,
    called,
    class_names,
    everything_in,
)
from mmcl.data.checks.overlap import tell_overlap
from mmcl.data.checks.part_check import PARTS, PartSoFar
from mmcl.data.checks.shard_check import NAMED, ShardFindings, ShardWork, unreadable
from mmcl.data.checks.twins import joined, repeats_of
from mmcl.data.faults import Faults
from mmcl.data.prepare import Part


class Gathering:
    """Faults and counts of a stream, growing shard by shard.

    Args:
        stream: that is checked.
    """

    def __init__(self, stream: TaskStream) -> None:
        self.stream = stream
        self.faults = Faults()
        self.remarks: list[str] = []
        self.parts: dict[tuple[int, Part], PartSoFar] = {}
        self.current: tuple[Task, Part] | None = None
        self.unusable: set[str] = set()

    def add(self, work: ShardWork, found: ShardFindings) -> None:
        """Take in what was found in the next shard."""
        here = work.task, work.part
        if self.current is None or self.current[0].index != work.task.index:
            fault = unreadable(work.task)
            if fault:
                self.faults.add(fault)
        if self.current != here:
            self.end_part()
            self.current = here
        names = work.task.train if work.part == "train" else work.task.test
        part = self.parts.setdefault((work.task.index, work.part), PartSoFar(names))
        if not found.fault:
            part.add(work, found)
        elif work.name not in self.unusable:
            self.unusable.add(work.name)
            self.faults.add(f"{called(work.task)}: shard {work.name} {found.fault}")

    def end_part(self) -> None:
        """Judge a part all of whose shards were added, and free what is needed no longer."""
        if self.current is None:
            return
        task, name = self.current
        part = self.parts[task.index, name]
        where = called(task) if task.index < 0 else f"{called(task)} ({name})"
        if part.is_whole:
            self.check_count(task, name, sum(part.samples))
        self.check_keys(where, part)
        for sort, (count, lines) in part.bad.items():
            for line in lines:
                self.faults.add(f"{where}: {line}")
            if count > len(lines):
                self.faults.add(f"and {count - len(lines)} more in {where} of this sort: {sort}")
        contents = joined([each[:, None] for each in part.contents], 1)[:, 0]
        twice = len(repeats_of(contents[contents != 0])[0])
        if twice:
            samples = "1 sample" if twice == 1 else f"{twice:,} samples"
            self.remarks.append(f"{where} holds {samples} that it had before")
        part.keys, part.contents, self.current = [], [], None

    def check_count(self, task: Task, part: Part, counted: int) -> None:
        """Compare the number of samples with the card."""
        stated = task.size if part == "train" else task.test_size
        name = "size" if part == "train" else "test_size"
        if stated not in (0, counted):
            self.faults.add(
                f"{called(task)} has {name} {stated} on the card and its {part} shards "
                f"hold {counted} samples: correct the card or fetch the shards again"
            )

    def check_keys(self, where: str, part: PartSoFar) -> None:
        """Note the keys that come more than once in a part."""
        keys = joined([each[:, None] for each in part.keys], 1)[:, 0]
        later, first = repeats_of(keys)
        for again, before in zip(later[:NAMED].tolist(), first[:NAMED].tolist(), strict=True):
            key, _, shard = part.sample_name(again, of_all=True).rpartition(" in ")
            other = part.sample_name(before, of_all=True).rpartition(" in ")[2]
            self.faults.add(
                f"{where}: key '{key}' comes twice, in {other} and in {shard}: "
                "give every sample its own key"
            )
        if len(later) > NAMED:
            self.faults.add(f"and {len(later) - NAMED} more repeated keys in {where}")

    def findings(self) -> StreamFindings:
        """Judge what only all shards together show, and return everything."""
        self.end_part()
        tell_overlap(self.stream, self.parts, self.faults, self.remarks)
        tasks = tuple(self.task_findings(task) for task in everything_in(self.stream))
        self.remark_absent(tasks)
        self.remark_hashes()
        return StreamFindings(
            self.stream.name, self.stream, tuple(self.faults.lines), tuple(self.remarks), tasks
        )

    def task_findings(self, task: Task) -> TaskFindings:
        """Sum up a task, probe or source."""
        train, test = (self.part_findings(task, part) for part in PARTS)
        return TaskFindings(task, class_names(self.stream, task), train, test)

    def part_findings(self, task: Task, part: Part) -> PartFindings | None:
        """Sum up a part of a task, None if it has no such part."""
        found = self.parts.get((task.index, part))
        return None if found is None else found.part_findings()

    def remark_absent(self, tasks: tuple[TaskFindings, ...]) -> None:
        """Note the classes of tasks that have no sample in one of their parts."""
        lines = [
            line
            for each in tasks
            for word, part in (("training", each.train), ("test", each.test))
            if part is not None and each.task.kind == "classify"
            for line in _absent(each, word, part)
        ]
        self.remarks += lines[:NAMED]
        if len(lines) > NAMED:
            self.remarks.append(f"and {len(lines) - NAMED} more parts of tasks lack classes")

    def remark_hashes(self) -> None:
        """Note shards whose content the card cannot vouch for, and hashes of none."""
        tasks = everything_in(self.stream)
        used = {name for task in tasks for name in (*task.train, *task.test)}
        without, unused = used - self.stream.hashes.keys(), self.stream.hashes.keys() - used
        if without:
            count = "no shard has a" if without == used else f"{len(without)} shards have no"
            self.remarks.append(
                f"{count} hash on the card: whether a shard is the one it was written for cannot "
                "be told"
            )
        if unused:
            self.remarks.append(
                f"the card has hashes of {len(unused)} shards that it lists nowhere, such as "
                f"{min(unused)}"
            )


def _absent(found: TaskFindings, word: str, part: PartFindings) -> list[str]:
    """Say in a line which classes of a task have no sample in a part, if any and if it is known."""
    counts = zip(found.classes, part.labels, strict=True) if part.is_all else ()
    absent = [f"'{name}'" for name, count in counts if count == 0]
    if not absent:
        return []
    more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
    return [
        f"{called(found.task)} has no {word} sample of {len(absent)} of its "
        f"{len(found.classes)} classes: {', '.join(absent[:NAMED])}{more}"
    ]
