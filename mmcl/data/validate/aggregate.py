"""Aggregator of a stream's validation: results of all shards, in the order of the card."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmcl.core import Task, TaskStream
from mmcl.data.errors import NAMED, ErrorList
from mmcl.data.protocols import Split
from mmcl.data.shards.open_stream import (
    add_repeated_keys,
    count_error,
    display_name,
    find_repeats,
    shard_names,
    task_type_error,
)
from mmcl.data.validate.duplicates import joined
from mmcl.data.validate.leakage import report_leakage
from mmcl.data.validate.results import (
    SplitFindings,
    StreamFindings,
    TaskFindings,
    class_names,
    tasks_and_sources,
)
from mmcl.data.validate.shard_check import ShardFindings, ShardJob
from mmcl.data.validate.split_check import SPLITS, SplitAccumulator


class ResultAggregator:
    """Errors, warnings and counts of a stream, growing shard by shard.

    Args:
        stream: that is validated.
    """

    def __init__(self, stream: TaskStream) -> None:
        self.stream = stream
        self.errors, self.warnings = ErrorList(), ErrorList()
        self.splits: dict[tuple[int, Split], SplitAccumulator] = {}
        self.current: tuple[Task, Split] | None = None
        self.unusable: set[str] = set()

    def add(self, job: ShardJob, found: ShardFindings) -> None:
        """Add the result of the next shard."""
        if self.current != (job.task, job.split):
            self.end_split()
            self.current = job.task, job.split
            error = task_type_error(job.task)
            if error:
                self.errors.add(error)
        split = self.splits.setdefault(
            (job.task.index, job.split), SplitAccumulator(shard_names(job.task, job.split))
        )
        if not found.error:
            split.add(job, found)
        elif job.name not in self.unusable:
            self.unusable.add(job.name)
            self.errors.add(f"{display_name(job.task)}: shard {job.name} {found.error}")

    def end_split(self) -> None:
        """Check a split all of whose shards were added, and free what is needed no longer."""
        if self.current is None:
            return
        task, name = self.current
        split = self.splits[task.index, name]
        where = display_name(task) if task.index < 0 else f"{display_name(task)} ({name})"
        error = count_error(task, name, split.samples)
        if error and split.counted == len(split.names):
            self.errors.add(error)
        found = [each for _, each in split.shards]
        keys = joined([each.keys[:, None] for each in found], 1)[:, 0]
        add_repeated_keys(self.errors, where, keys, split.key_name)
        for sort, (count, lines) in split.counts.bad.items():
            named = [f"{where}: {line}" for line in lines]
            self.errors.add_some(named, f"in {where} of this sort: {sort}", count)
        contents = joined([each.contents[:, None] for each in found], 1)[:, 0]
        twice = len(find_repeats(contents[contents != 0])[0])
        if twice:
            samples = "1 duplicate sample" if twice == 1 else f"{twice:,} duplicate samples"
            self.warnings.add(f"{where} has {samples}")
        for each in found:
            each.keys = each.contents = np.zeros(0, np.uint64)
        self.current = None

    def findings(self) -> StreamFindings:
        """Check what only all shards together show, and return all results."""
        self.end_split()
        report_leakage(self.stream, self.splits, self.errors, self.warnings)
        everything = tasks_and_sources(self.stream)
        tasks = tuple(self.task_findings(task) for task in everything)
        absent = [line for each in tasks for line in _absent_classes(each)]
        self.warnings.add_some(absent, "splits of tasks lack classes")
        self.check_hashes({name for task in everything for name in (*task.train, *task.test)})
        return StreamFindings(
            self.stream.name,
            self.stream,
            tuple(self.errors.lines),
            tuple(self.warnings.lines),
            tasks,
        )

    def task_findings(self, task: Task) -> TaskFindings:
        """Summarize a task, eval-only task or source."""
        train, test = (self.splits.get((task.index, split)) for split in SPLITS)
        return TaskFindings(
            task,
            class_names(self.stream, task),
            None if train is None else train.summarize(),
            None if test is None else test.summarize(),
        )

    def check_hashes(self, used: set[str]) -> None:
        """Add warnings for shards without a hash on the card, and for hashes without a shard."""
        without, unused = used - self.stream.hashes.keys(), self.stream.hashes.keys() - used
        if without:
            count = "no shard has a" if without == used else f"{len(without)} shards have no"
            self.warnings.add(f"{count} hash on the card: a replaced shard would not be noticed")
        if unused:
            self.warnings.add(
                f"the card has hashes of {len(unused)} shards that it lists nowhere, such as "
                f"{min(unused)}"
            )


def _absent_classes(found: TaskFindings) -> Iterator[str]:
    """Yield a line for each split in which classes of the task are known to have no sample."""
    splits: tuple[tuple[str, SplitFindings | None], ...]
    splits = ("training", found.train), ("test", found.test)
    for name, split in splits:
        if split is None or not split.is_all or found.task.task_type != "classification":
            continue
        counts = zip(found.classes, split.labels, strict=True)
        absent = [f"'{each}'" for each, count in counts if count == 0]
        if absent:
            more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            yield (
                f"{display_name(found.task)} has no {name} sample of {len(absent)} of its "
                f"{len(found.classes)} classes: {', '.join(absent[:NAMED])}{more}"
            )
