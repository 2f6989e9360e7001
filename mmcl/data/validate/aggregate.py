"""Aggregator of a stream's validation: results of all shards, and leakage across all tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmcl.core import Task, TaskStream
from mmcl.data.convert.class_names import naming_remark
from mmcl.data.shards.open_stream import (
    add_repeated_keys,
    count_error,
    display_name,
    find_repeats,
    open_shard,
    shard_names,
    task_type_error,
)
from mmcl.data.shards.reader import Reader
from mmcl.data.shards.sample_fields import UnusedMembers
from mmcl.data.stored_sample import NAMED, ErrorList, IntArray, Split
from mmcl.data.validate.results import (
    SplitFindings,
    StreamFindings,
    TaskFindings,
    class_names,
    tasks_and_sources,
    value_range,
)
from mmcl.data.validate.shard_check import (
    BadSamples,
    Fingerprints,
    SampleCounts,
    ShardFindings,
    ShardJob,
)

SPLITS: tuple[Split, Split] = ("train", "test")
# Odd, so that the hashes of no two questions coincide: 2^64 divided by the golden ratio.
_ODD_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_ANSWERS_SHOWN = 20


@dataclass
class SplitAccumulator:
    """Accumulator over the shards of a split.

    Attributes:
        names: of all its shards.
        shards: job and result of each shard that can be used, or of its chunks, in order. Their
            fingerprints are kept to the end, hashes of keys and contents until the split ends.
        counts: over all of them.
        new_bad: as ``counts.bad``, without samples that another split listed already.
    """

    names: tuple[str, ...]
    shards: list[tuple[ShardJob, ShardFindings]] = field(default_factory=list)
    counts: SampleCounts = field(default_factory=SampleCounts)
    new_bad: SampleCounts = field(default_factory=SampleCounts)

    @property
    def counted(self) -> int:
        """Number of shards whose samples were counted."""
        return sum(job.chunk[0] == 0 for job, _ in self.shards)

    @property
    def samples(self) -> int:
        """Number of samples in the counted shards."""
        return sum(found.samples for _, found in self.shards)

    @property
    def decoded(self) -> int:
        """Number of samples that were decoded."""
        return sum(len(found.fingerprints) for _, found in self.shards)

    @property
    def fingerprints(self) -> Fingerprints:
        """(n, 3) fingerprints of the samples that were decoded."""
        return joined([found.fingerprints for _, found in self.shards])

    def add(self, job: ShardJob, found: ShardFindings) -> None:
        """Add the result of the next shard."""
        self.counts.merge(found.counts)
        found.counts = SampleCounts()
        self.shards.append((job, found))

    def sample_name(self, index: int) -> str:
        """Return "<key> in <shard>" of an index into all fingerprints."""
        number, own = _shard_at([len(found.fingerprints) for _, found in self.shards], index)
        job, found = self.shards[number]
        return _reader(job).describe(int(job.indices(found.in_shard)[own]))

    def key_name(self, index: int) -> tuple[str, str]:
        """Return key and shard of an index into the hashes of all keys."""
        number, own = _shard_at([found.samples for _, found in self.shards], index)
        return _reader(self.shards[number][0]).name_of(own)

    def summarize(self) -> SplitFindings:
        """Summarize the split."""
        counts = self.counts
        lengths = value_range(counts.lengths, lambda length: length)
        return SplitFindings(
            shards=len(self.names),
            counted=self.counted,
            samples=self.samples,
            decoded=self.decoded,
            bad=sum(count for count, _ in counts.bad.values()),
            size_bytes=counts.size_bytes,
            labels=tuple(counts.labels.tolist()),
            sizes=value_range(counts.sizes, lambda size: (size[0] * size[1], size)),
            lengths=None if lengths is None else lengths[1:],
            answers=tuple(counts.answers.most_common(_ANSWERS_SHOWN)),
        )


def _shard_at(counts: list[int], index: int) -> tuple[int, int]:
    """Return the shard of an index into all shards, and its index in there."""
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, index, side="right"))
    return number, index - int(ends[number]) + counts[number]


def _reader(job: ShardJob) -> Reader:
    return Reader([open_shard(job.name, job.url, job.options)])


class TrainFingerprints:
    """Lookup of fingerprints among those of all training samples; 40 bytes a sample.

    Args:
        fingerprints: (n, 3) of the training samples.
        by_image: compare images alone, whatever the questions are.
    """

    def __init__(self, fingerprints: Fingerprints, by_image: bool = False) -> None:
        self.fingerprints, self.by_image = fingerprints, by_image
        keys = self._keys(fingerprints)
        # Stable, so that of several the first in the order of the card is named.
        self._order: IntArray = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, fingerprints: Fingerprints) -> IntArray:
        """Find the first training sample that equals each of (m, 3) fingerprints.

        Returns:
            (m,) its index, -1 where there is none.
        """
        found = np.full(len(fingerprints), -1, dtype=np.int64)
        if len(self.fingerprints) == 0 or len(fingerprints) == 0:
            return found
        keys = self._keys(fingerprints)
        start = np.searchsorted(self._sorted, keys)
        has_key = self._sorted[np.minimum(start, len(self._sorted) - 1)] == keys
        columns = slice(0, 2 if self.by_image else 3)
        left = np.flatnonzero(has_key & fingerprints[:, columns].any(axis=1))
        # Different samples of one 64-bit key are rare, so a second round is.
        while len(left):
            first = self._order[start[left]]
            is_same = (fingerprints[left, columns] == self.fingerprints[first, columns]).all(axis=1)
            found[left[is_same]] = first[is_same]
            left = left[~is_same]
            start[left] += 1
            left = left[start[left] < len(self._sorted)]
            left = left[self._sorted[start[left]] == keys[left]]
        return found

    def _keys(self, fingerprints: Fingerprints) -> Fingerprints:
        if self.by_image:
            return fingerprints[:, 0]
        return fingerprints[:, 0] ^ (fingerprints[:, 2] * _ODD_FACTOR)


def joined(arrays: Sequence[Fingerprints]) -> Fingerprints:
    """Concatenate (n, 3) arrays; no array gives (0, 3)."""
    return np.concatenate([np.zeros((0, 3), dtype=np.uint64), *arrays])


Splits = Mapping[tuple[int, Split], SplitAccumulator]


def report_leakage(
    stream: TaskStream, splits: Splits, errors: ErrorList, warnings: ErrorList
) -> None:
    """Compare the test samples of every task and eval-only task with all training samples.

    The same image in training and test is an error; of samples with questions, the same image and
    question. A known image with another question is a warning.

    Errors name the first samples of each task, and the number of the others.
    """
    trained = [
        (task, splits[task.index, "train"])
        for task in tasks_and_sources(stream)
        if (task.index, "train") in splits
    ]
    starts = np.cumsum([0, *(split.decoded for _, split in trained)], dtype=np.int64)
    fingerprints = joined([found.fingerprints for _, split in trained for _, found in split.shards])

    def train_name(index: int) -> str:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        task, split = trained[number]
        return f"{split.sample_name(index - int(starts[number]))} of {display_name(task)}"

    tested = [(t, splits[t.index, "test"]) for t in stream.all_tasks if (t.index, "test") in splits]
    lookup = TrainFingerprints(fingerprints)
    leaked = [lookup.find(split.fingerprints) for _, split in tested]
    del lookup  # 16 bytes a sample
    lookup = TrainFingerprints(fingerprints, by_image=True)
    for (task, split), same in zip(tested, leaked, strict=True):
        what = "image and question" if task.task_type == "instruction" else "image"
        found = np.flatnonzero(same >= 0)
        lines = [
            f"{display_name(task)} (test): {split.sample_name(index)} is trained on, it has the "
            f"{what} of {train_name(int(same[index]))}: remove it from one of them"
            for index in found[:NAMED].tolist()
        ]
        errors.add_some(lines, f"test samples of '{task.name}' are trained on", len(found))
        same_image = np.where(same < 0, lookup.find(split.fingerprints), -1)
        known = np.flatnonzero(same_image >= 0).tolist()
        if known:
            warnings.add(
                f"{len(known):,} test samples of {display_name(task)} have another question about "
                f"an image that is trained on, such as {split.sample_name(known[0])} and "
                f"{train_name(int(same_image[known[0]]))}"
            )


def report_shared_images(stream: TaskStream, splits: Splits, warnings: ErrorList) -> None:
    """Warn of tasks that train on images of tasks before them; of an image the first counts."""
    tasks = [task for task in stream.tasks if (task.index, "train") in splits]
    # Half of the hash is enough to count: two of 2^64 coincide once in some billion images.
    images = [np.unique(splits[task.index, "train"].fingerprints[:, 0]) for task in tasks]
    images = [own[own != 0] for own in images]
    owner = np.repeat(np.arange(len(tasks)), [len(own) for own in images])
    every = np.concatenate([np.zeros(0, np.uint64), *images])
    order = np.argsort(every, kind="stable")
    is_repeat = np.r_[False, every[order][1:] == every[order][:-1]][: len(order)]
    first = order[np.maximum.accumulate(np.where(is_repeat, 0, np.arange(len(order))))]
    pairs = np.stack([owner[order], owner[first]], axis=1)[is_repeat]
    for (later, earlier), count in Counter(map(tuple, pairs.tolist())).items():
        warnings.add(
            f"{display_name(tasks[later])} has {count:,} of its {len(images[later]):,} training "
            f"images also in {display_name(tasks[earlier])}"
        )


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
        self.unused, self.unsorted = UnusedMembers(), dict[str, None]()
        self._bad_of: dict[tuple[str, tuple[int, int]], dict[str, BadSamples]] = {}

    def add(self, job: ShardJob, found: ShardFindings) -> None:
        """Add the result of the next shard."""
        if self.current != (job.task, job.split):
            self.end_split()
            self.current = job.task, job.split
            self.errors.add(task_type_error(job.task))
        split = self.splits.setdefault(
            (job.task.index, job.split), SplitAccumulator(shard_names(job.task, job.split))
        )
        if not found.error:
            # The samples of a shard that several tasks list are bad once, if for the same reasons.
            known = self._bad_of.setdefault((job.name, job.chunk), {})
            for sort, (count, lines) in found.counts.bad.items():
                if known.get(sort) != (count, lines):
                    split.new_bad.add_bad(sort, lines, count)
                known[sort] = (count, lines)
            split.add(job, found)
            ignored = job.task.ignore_members
            self.unused.add(job.name, found.samples, found.members, found.used, ignored)
            if not found.is_sorted:
                self.unsorted[job.name] = None
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
        if split.counted == len(split.names):
            self.errors.add(count_error(task, name, split.samples))
        found = [each for _, each in split.shards]
        keys = np.concatenate([np.zeros(0, np.uint64), *(each.keys for each in found)])
        add_repeated_keys(self.errors, where, keys, split.key_name)
        for sort, (count, lines) in split.new_bad.bad.items():
            named = [f"{where}: {line}" for line in lines]
            self.errors.add_some(named, f"in {where} of this sort: {sort}", count)
        contents = np.concatenate([np.zeros(0, np.uint64), *(each.contents for each in found)])
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
        report_shared_images(self.stream, self.splits, self.warnings)
        everything = tasks_and_sources(self.stream)
        tasks = tuple(self.task_findings(task) for task in everything)
        absent = [line for each in tasks for line in _absent_classes(each)]
        self.warnings.add_some(absent, "splits of tasks lack classes")
        if self.unsorted:
            self.warnings.add(
                f"members of a sample lie apart in {len(self.unsorted)} shards, such as "
                f"{next(iter(self.unsorted))}: mmcl reads them, other readers of webdataset do "
                "not; write them with tar --sort=name"
            )
        self.check_class_names()
        self.check_hashes({name for task in everything for name in (*task.train, *task.test)})
        errors, warnings = tuple(self.errors.lines), tuple(self.warnings.lines)
        notes = self.unused.lines()
        return StreamFindings(
            self.stream.name, self.stream, errors, warnings, tasks, notes, self.errors.count
        )

    def task_findings(self, task: Task) -> TaskFindings:
        """Summarize a task, eval-only task or source."""
        splits = (self.splits.get((task.index, split)) for split in SPLITS)
        train, test = (None if split is None else split.summarize() for split in splits)
        return TaskFindings(task, class_names(self.stream, task), train, test)

    def check_class_names(self) -> None:
        """Add a warning if prompts would have names of classes that no caption has."""
        tasks = [task for task in self.stream.all_tasks if task.task_type == "classification"]
        classes = dict.fromkeys(name for task in tasks for name in task.classes)
        template = next((text for task in tasks for text in task.templates), "{}")
        self.warnings.add(naming_remark(self.stream.prompt_names(classes), template))

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
