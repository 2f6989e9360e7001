"""Assignment of the records of an input to tasks, splits and shards."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timezone
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import torch

from mmcl.core.seeding import hash_seed, splitmix64
from mmcl.data.convert.inputs.image_folder_input import natural
from mmcl.data.convert.record import SPLITS, ConvertOptions, InputData
from mmcl.data.convert.scan import ScanResult
from mmcl.data.stored_sample import IntArray

_TEST = SPLITS.index("test")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,4})?", re.ASCII | re.IGNORECASE)
_DATE = re.compile(r"(\d{4})(?:[-/.](\d{1,2})(?:[-/.](\d{1,2})(?:[T ](\S.*))?)?)?", re.ASCII)
_UNCERTAIN_DATE = re.compile(
    r"\d{1,2}[-/.](\d{1,2}[-/.](\d{4}|\d{2})|\d{4})\b.*|(.*\W)?(jan(uary)?|feb(ruary)?|mar(ch)?|apr(il)?|"
    r"may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?)(\W.*)?",
    re.ASCII | re.IGNORECASE,
)
"""Dates that would be sorted wrongly as texts: 3/4/2024, 4/2024, 4 March 2024."""
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SplitSamples:
    """Samples of one split of a task.

    Attributes:
        scan: of their input.
        numbers: (r,) of the records in it, in the order in which they fill shards.
        labels: (r,) class ids, zeros if there are no classes.
    """

    scan: ScanResult
    numbers: IntArray
    labels: IntArray

    @property
    def content(self) -> npt.NDArray[np.uint64]:
        """(r,) hashes of the images, or of texts without an image."""
        return self.scan.content[self.numbers]


@dataclass(frozen=True)
class TaskSplits:
    """A task with the samples of both splits.

    Attributes:
        name: of the task.
        classes: that occur in it, in the card's order.
        train: training samples.
        test: test samples.
    """

    name: str
    classes: tuple[str, ...]
    train: SplitSamples
    test: SplitSamples


def assign_tasks(
    train: ScanResult, test: ScanResult | None, options: ConvertOptions, known: Sequence[str] = ()
) -> tuple[list[TaskSplits], list[str]]:
    """Assign records to tasks and splits.

    Args:
        train: scan of the input.
        test: scan of a separate test input; None takes the test split of ``train``, or holds out
            a fraction of every class, with byte-identical images in one split.
        options: of the conversion.
        known: classes that the card has already, whose ids stay.

    Returns:
        The tasks, and all classes in the order of their ids.

    Raises:
        ValueError: if a task would have no training or no test samples, tasks are stated in two
            ways, or their order cannot be obeyed.
    """
    classes: list[str] = []
    own: list[str] = []
    scans = [train] if test is None else [train, test]
    if train.source.task_type == "classification":
        met = {s.labels[index] for s in scans for index in np.unique(s.label[s.size > 0])}
        own = sorted(met, key=natural)
        stated = [name for name in train.source.classes if name in set(own)]
        own = list(dict.fromkeys([*stated, *own]))
        if options.class_order_seed is not None:
            own = [own[index] for index in class_order(len(own), options.class_order_seed)]
        classes = list(dict.fromkeys([*known, *own]))
    names, tasks = _tasks_of(scans, options, {name: classes.index(name) for name in own})
    ids = {name: number for number, name in enumerate(classes)}
    labels = [_looked_up(scan.label, scan.labels, ids, unknown=0) for scan in scans]
    is_test = _is_test(scans, tasks[0], labels[0], options)
    assigned = []
    for index, name in enumerate(names):
        learned = _hand(train, (tasks[0] == index) & ~is_test, labels[0])
        scored = _hand(train, (tasks[0] == index) & is_test, labels[0])
        if test is not None:
            scored = _hand(test, tasks[1] == index, labels[1])
        _expect_some(name, learned, scored)
        both = np.union1d(learned.labels, scored.labels) if classes else ()
        assigned.append(TaskSplits(name, tuple(classes[label] for label in both), learned, scored))
    return assigned, classes


def class_order(count: int, seed: int) -> list[int]:
    """Draw the class order of a seed: entry n is the class that is learned as number n.

    ``numpy.random.seed(seed); numpy.random.permutation(count)`` as in iCaRL (Rebuffi et al. 2017,
    arXiv:1611.07725), PyCIL and PILOT, whose seed is 1993; numpy's own state is not touched.
    """
    return [int(index) for index in np.random.RandomState(seed).permutation(count)]


def class_groups(count: int, classes_per_task: int, first_task_classes: int | None) -> list[range]:
    """Split positions 0 to ``count`` - 1 of the class order into tasks; the last may be smaller.

    ``B50-Inc10`` of the literature is ``first_task_classes`` 50 (``init_cls`` in PILOT) and
    ``classes_per_task`` 10 (``increment``); ``B0-Inc10`` is None and 10.

    Raises:
        ValueError: if a number of classes is less than 1, or the first task would take all.
    """
    given = {"classes_per_task": classes_per_task, "first_task_classes": first_task_classes}
    for name, number in given.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, expected 1 or more")
    if (first_task_classes or 0) >= count:
        raise ValueError(
            f"--first_task_classes is {first_task_classes}, and there are {count} classes: leave "
            "some to the next task, or leave the option out"
        )
    starts = [0, *range(first_task_classes or classes_per_task, count, classes_per_task)]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], count], strict=True)]


def sort_tasks(names: Sequence[str], column: str) -> tuple[list[str], str]:
    """Sort the values of a task column: numbers by value, dates by time, other texts naturally.

    Dates are 2024, 2024-03, 2024-03-04 or this with a time, also with / or . between; a time
    without a zone is UTC.

    Args:
        names: the distinct values.
        column: of the values, for messages.

    Returns:
        The values in order, and as what they were compared: "numbers", "dates" or "texts".

    Raises:
        ValueError: if two values are the same number or time, or all are dates of another form.
    """
    for kind, key_of in (("numbers", _number), ("dates", _date)):
        keys = [key_of(name) for name in names]
        if None in keys:
            continue
        ranked = sorted(zip(keys, names, strict=True))
        for (before, one), (after, other) in zip(ranked, ranked[1:], strict=False):
            if before == after:
                raise ValueError(
                    f"'{column}' has {one!r} and {other!r}, which are equal as {kind}: write them "
                    "alike, or give the order of all tasks as --task_order"
                )
        return [name for _, name in ranked], kind
    if all(_UNCERTAIN_DATE.fullmatch(name) for name in names):
        raise ValueError(
            f"'{column}' has dates such as {names[0]!r}, whose order is not certain: write them as "
            "2024-03-31, or give the order of all tasks as --task_order"
        )
    return sorted(names, key=natural), "texts"


def _number(text: str) -> Decimal | None:
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def _date(text: str) -> datetime | None:
    found = _DATE.fullmatch(text)
    if not found:
        return None
    year, month, day, clock = found.groups()
    try:
        day_start = datetime(int(year), int(month or 1), int(day or 1))
        at = datetime.combine(
            day_start, time.fromisoformat((clock or "00:00").replace("Z", "+00:00"))
        )
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=timezone.utc)


def class_positions(tasks: Sequence[TaskSplits], options: ConvertOptions) -> list[dict[str, str]]:
    """Return for each task a description that says which part of the seeded class order it is."""
    if options.class_order_seed is None:
        return [{} for _ in tasks]
    ends = np.cumsum([len(task.classes) for task in tasks]).tolist()
    order = f"numpy.random.RandomState({options.class_order_seed}).permutation({ends[-1]})"
    return [
        {"description": f"classes {end - len(task.classes)} to {end - 1} of {order}"}
        for task, end in zip(tasks, ends, strict=True)
    ]


def task_notes(tasks: Sequence[TaskSplits], options: ConvertOptions) -> list[str]:
    """Return what a user may not expect of the tasks, or has to report of them."""
    notes = []
    if options.class_order_seed is not None:
        seed = options.class_order_seed
        notes.append(f"classes are in the order of seed {seed}, drawn as in iCaRL, PyCIL and PILOT")
    wanted, last = options.classes_per_task, len(tasks[-1].classes)
    if wanted is not None and last < wanted:
        notes.append(
            f"the last task has {last} of {wanted} classes: "
            f"{sum(len(task.classes) for task in tasks)} classes do not fill all tasks"
        )
    column = tasks[0].train.scan.source.task_column
    if column and not options.task_order:
        kind = sort_tasks([task.name for task in tasks], column)[1]
        notes.append(f"tasks are in the order of '{column}', compared as {kind}")
    return notes


def grouped_holdout(
    content: npt.NDArray[np.uint64], group: IntArray, fraction: float, seed: int
) -> Bits:
    """Draw a hold-out of every group so that equal contents are never in both splits.

    A group of two or more contents gives at least one and keeps at least one, unless its last
    content was drawn for another group.

    Args:
        content: (n,) hashes.
        group: (n,) for example classes.
        fraction: of every group, between 0 and 1.
        seed: of the draw, which depends on the contents alone.

    Returns:
        (n,) whether each is held out.
    """
    if not len(content):
        return np.zeros(0, dtype=bool)
    state = (content ^ np.uint64(hash_seed(seed))).view(np.int64)
    priority = splitmix64(torch.from_numpy(state)).numpy().view(np.uint64)
    order = np.lexsort((priority, group))
    position = np.arange(len(order))
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = np.diff(group[order]) != 0
    new_content = new_group.copy()
    new_content[1:] |= priority[order][1:] != priority[order][:-1]
    start = np.maximum.accumulate(np.where(new_group, position, 0))
    first = np.maximum.accumulate(np.where(new_content, position, 0)) - start
    ends = np.append(np.flatnonzero(new_group)[1:], len(order)) - 1
    which = np.cumsum(new_group) - 1
    counts = ends - np.flatnonzero(new_group) + 1
    wanted = np.maximum(1, np.rint(fraction * counts))
    drawn = (first < wanted[which]) & (first < first[ends][which])
    return np.isin(content, content[order[drawn]])


def shard_slices(sizes: IntArray, max_count: int, max_bytes: int) -> Iterator[slice]:
    """Yield a slice of records for each shard, given (r,) bytes of each record.

    A shard exceeds ``max_bytes`` only if one record alone is larger.
    """
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        fit = int(np.searchsorted(ends, before + max_bytes, side="right"))
        last = max(first + 1, min(first + max_count, fit))
        yield slice(first, last)
        first = last


def interleave_classes(labels: IntArray) -> IntArray:
    """Order records so that every stretch holds samples of every class, each class in its order.

    From (r,) classes to (r,) indices in the new order.
    """
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    fraction = (within + 0.5) / np.repeat(counts, counts)
    return np.asarray(order[np.argsort(fraction, kind="stable")], dtype=np.int64)


def _tasks_of(
    scans: Sequence[ScanResult], options: ConvertOptions, classes: Mapping[str, int]
) -> tuple[list[str], list[IntArray]]:
    """Return the names of tasks, and for every input (n,) the index of each record's task.

    ``classes`` are name -> class id of those that occur, in the order in which they are learned.
    """
    where = scans[0].source.where
    stated = list(dict.fromkeys(
        scan.tasks[index] for scan in scans
        for index in sorted(np.unique(scan.task[scan.size > 0]).tolist())
    ))  # fmt: skip
    if any(stated):
        for option, value in (
            ("--classes_per_task", options.classes_per_task), ("--task", options.task),
        ):  # fmt: skip
            if value:
                raise ValueError(
                    f"{where} states its tasks itself "
                    f"({', '.join(map(repr, stated[:5]))}): leave out {option}"
                )
    if options.classes_per_task is not None:
        if not classes:
            raise ValueError(
                "--classes_per_task splits classes into tasks, and there are no classes"
            )
        if options.task or options.task_order:
            option = "--task" if options.task else "--task_order"
            raise ValueError(
                f"{option} is for tasks of names, and --classes_per_task numbers them: leave out "
                "one of the two"
            )
        ids = list(classes.values())
        groups = class_groups(len(ids), options.classes_per_task, options.first_task_classes)
        names = [f"classes-{ids[group[0]]}-{ids[group[-1]]}" for group in groups]
        own = list(classes)
        table = {own[position]: n for n, group in enumerate(groups) for position in group}
        return names, [_looked_up(scan.label, scan.labels, table) for scan in scans]
    stated = _ordered(stated, scans[0].source, options.task_order)
    table = {name: index for index, name in enumerate(stated)}
    names = [name or options.task or options.name for name in stated]
    return names, [_looked_up(scan.task, scan.tasks, table) for scan in scans]


def _ordered(stated: list[str], source: InputData, wanted: Sequence[str]) -> list[str]:
    """Return the stated tasks in the order in which they are learned.

    Raises:
        ValueError: if ``wanted`` is not an order of exactly these tasks, or as `sort_tasks` says.
    """
    if not wanted:
        return sort_tasks(stated, source.task_column)[0] if source.task_column else stated
    listed = ", ".join(map(repr, stated[:20])) + (", ..." if len(stated) > 20 else "")
    if not any(stated):
        raise ValueError(
            f"--task_order orders tasks, and {source.where} is one task: say with --task_column, "
            "or --task_level for folders, what states the task"
        )
    missing, twice = set(stated) - set(wanted), len(set(wanted)) < len(wanted)
    unknown = [name for name in wanted if name not in stated]
    if missing or unknown or twice:
        what = f"lacks {min(missing)!r}" if missing else "names a task twice"
        what = f"names {unknown[0]!r}" if unknown else what
        raise ValueError(f"--task_order {what}: list each task of {source.where} once: {listed}")
    return list(wanted)


def _looked_up(
    indices: npt.NDArray[np.int32],
    names: Sequence[str],
    table: Mapping[str, int],
    unknown: int = -1,
) -> IntArray:
    """Return (n,) the number in a table of each name, given (n,) indices into the names."""
    numbers = np.array([table.get(name, unknown) for name in names] or [unknown], dtype=np.int64)
    return np.asarray(numbers[indices], dtype=np.int64)


def _is_test(
    scans: Sequence[ScanResult], task: IntArray, label: IntArray, options: ConvertOptions
) -> Bits:
    """Return (n,) which records of the first input are test samples."""
    train = scans[0]
    usable = train.size > 0
    is_test = np.zeros(len(train), dtype=bool)
    if len(scans) > 1:
        return is_test
    if bool((train.split[usable] == _TEST).any()):
        return np.asarray(train.split == _TEST)
    group = task * (1 + int(label.max(initial=0))) + label
    is_test[usable] = grouped_holdout(
        train.content[usable], group[usable], options.test_fraction, options.seed
    )
    return is_test


def _hand(scan: ScanResult, chosen: Bits, labels: IntArray) -> SplitSamples:
    numbers = np.flatnonzero(chosen & (scan.size > 0))
    if scan.source.interleaved and scan.source.task_type == "classification":
        numbers = numbers[interleave_classes(labels[numbers])]
    return SplitSamples(scan, numbers, labels[numbers])


def _expect_some(name: str, learned: SplitSamples, scored: SplitSamples) -> None:
    if not len(learned.numbers):
        raise ValueError(
            f"task {name!r} has no training samples in {learned.scan.source.where}: all of them "
            "are in the test split or left out"
        )
    if not len(scored.numbers):
        raise ValueError(
            f"task {name!r} has no test samples in {scored.scan.source.where}: give --test, or "
            f"more different images than its {len(learned.numbers)} samples have"
        )
