"""Dealing the records of a source to tasks, to train and test, and to shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mmcl.core.randomness import mix
from mmcl.data.making.folder import natural
from mmcl.data.making.looking import Looked
from mmcl.data.making.options import MakeOptions
from mmcl.data.making.record import PARTS
from mmcl.data.shard import Numbers

_TRAIN, _TEST = PARTS.index("train"), PARTS.index("test")
Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Hand:
    """What one part of a task gets.

    Attributes:
        looked: the source.
        numbers: (r,) records in it, in the order in which they fill shards.
        labels: (r,) card numbers of their classes, zeros where there are none.
    """

    looked: Looked
    numbers: Numbers
    labels: Numbers


@dataclass(frozen=True)
class DealtTask:
    """A task with all its records.

    Attributes:
        name: of the task.
        classes: that occur in it, in the card's order.
        train: what is learned.
        test: what is scored.
    """

    name: str
    classes: tuple[str, ...]
    train: Hand
    test: Hand


def deal(
    train: Looked, test: Looked | None, options: MakeOptions, known: Sequence[str] = ()
) -> tuple[list[DealtTask], list[str]]:
    """Deal records to tasks.

    Args:
        train: the source.
        test: a source of what is scored; None takes the first one's test part, or holds out a
            share of it, of every class, byte-identical pictures on one side.
        options: see there.
        known: classes that the card has already, whose numbers stay.

    Returns:
        The tasks, and all classes in the order of their numbers.

    Raises:
        ValueError: if a task would have nothing to learn from or to test on, or tasks are stated
            in two ways.
    """
    kind = train.source.kind
    classes: list[str] = []
    own: list[str] = []
    if kind == "classify":
        own = sorted({name for one in (train, test) if one for name in _labels(one)}, key=natural)
        stated = list(train.source.classes)
        order = [*(name for name in stated if name in set(own)), *own]
        classes = list(dict.fromkeys([*known, *order]))
        own = list(dict.fromkeys(order))
    numbered = {name: classes.index(name) for name in own}
    names, rows = _tasks_of([train, *filter(None, [test])], options, numbered)
    columns = [_numbers(one, classes) for one in (train, test) if one is not None]
    tested = _tested(train, test, rows[0], columns[0], options)
    dealt = []
    for place, name in enumerate(names):
        learned = Hand(train, *_chosen(train, rows[0] == place, ~tested, columns[0]))
        scored = Hand(train, *_chosen(train, rows[0] == place, tested, columns[0]))
        if test is not None:
            scored = Hand(test, *_chosen(test, rows[1] == place, None, columns[1]))
        _expect_some(name, learned, scored, options)
        both = np.union1d(learned.labels, scored.labels) if classes else ()
        dealt.append(DealtTask(name, tuple(classes[label] for label in both), learned, scored))
    return dealt, classes


def held_out(content: npt.NDArray[np.uint64], group: Numbers, share: float, seed: int) -> Bits:
    """Draw a share of every group so that equal contents are never on both sides.

    A group of two or more contents gives at least one and keeps at least one, unless its last
    content was drawn for another group.

    Args:
        content: (n,) hashes.
        group: (n,) for example classes.
        share: between 0 and 1.
        seed: of the draw, which depends on the contents alone.

    Returns:
        (n,) whether each is held out.
    """
    if not len(content):
        return np.zeros(0, dtype=bool)
    rank = _mixed(content, seed)
    order = np.lexsort((rank, group))
    here = np.arange(len(order))
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = np.diff(group[order]) != 0
    new_content = new_group.copy()
    new_content[1:] |= rank[order][1:] != rank[order][:-1]
    start = np.maximum.accumulate(np.where(new_group, here, 0))
    first = np.maximum.accumulate(np.where(new_content, here, 0)) - start
    ends = np.append(np.flatnonzero(new_group)[1:], len(order)) - 1
    which = np.cumsum(new_group) - 1
    counts = ends - np.flatnonzero(new_group) + 1
    wanted = np.maximum(1, np.rint(share * counts))
    drawn = (first < wanted[which]) & (first < first[ends][which])
    return np.isin(content, content[order[drawn]])


def cuts(sizes: Numbers, most: int, most_bytes: int) -> Iterator[slice]:
    """Cut records into shards of at most ``most``, and of bytes unless one alone has more."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        fit = int(np.searchsorted(ends, before + most_bytes, side="right"))
        last = max(first + 1, min(first + most, fit))
        yield slice(first, last)
        first = last


def spread(labels: Numbers) -> Numbers:
    """Order records so that every stretch holds some of every class, each class in its order.

    Args:
        labels: (r,) classes.

    Returns:
        (r,) places in the new order.
    """
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    share = (within + 0.5) / np.repeat(counts, counts)
    return np.asarray(order[np.argsort(share, kind="stable")], dtype=np.int64)


def _mixed(content: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Hash hashes with a seed: splitmix64."""
    state = content ^ np.uint64(mix(seed))
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)), dtype=np.uint64)


def _labels(looked: Looked) -> list[str]:
    """Return the classes that usable records have."""
    met = np.unique(looked.label[looked.size > 0])
    return [looked.labels[place] for place in met]


def _numbers(looked: Looked, classes: Sequence[str]) -> Numbers:
    place = {name: number for number, name in enumerate(classes)}
    table = np.array([place.get(name, 0) for name in looked.labels] or [0], dtype=np.int64)
    return np.asarray(table[looked.label], dtype=np.int64)


def _tasks_of(
    sources: Sequence[Looked], options: MakeOptions, classes: Mapping[str, int]
) -> tuple[list[str], list[Numbers]]:
    """Return the names of tasks, and for every source (n,) the place of each record's task.

    Args:
        sources: one or two.
        options: see there.
        classes: name -> card number of those that occur, in the order in which they are learned.
    """
    stated = list(dict.fromkeys(
        looked.tasks[place] for looked in sources
        for place in sorted(np.unique(looked.task[looked.size > 0]).tolist())
    ))  # fmt: skip
    if options.classes_per_task is not None:
        if any(stated):
            raise ValueError(
                f"{sources[0].source.where} says itself which tasks there are "
                f"({', '.join(map(repr, stated[:5]))}): leave out --classes_per_task"
            )
        if not classes:
            raise ValueError("--classes_per_task cuts classes into tasks, and there are no classes")
        step, numbers = options.classes_per_task, list(classes.values())
        cut = [numbers[first : first + step] for first in range(0, len(numbers), step)]
        names = [f"classes-{own[0]}-{own[-1]}" for own in cut]
        table: Mapping[str, int] = {name: n // step for n, name in enumerate(classes)}
        return names, [_looked_up(one.label, one.labels, table) for one in sources]
    table = {name: place for place, name in enumerate(stated)}
    names = [name or options.task or options.name for name in stated]
    return names, [_looked_up(one.task, one.tasks, table) for one in sources]


def _looked_up(
    places: npt.NDArray[np.int32], names: Sequence[str], table: Mapping[str, int]
) -> Numbers:
    numbers = np.array([table.get(name, -1) for name in names] or [-1], dtype=np.int64)
    return np.asarray(numbers[places], dtype=np.int64)


def _tested(
    train: Looked, test: Looked | None, task: Numbers, column: Numbers, options: MakeOptions
) -> Bits:
    """Return (n,) which records of the first source are scored."""
    usable = train.size > 0
    if test is not None:
        return np.zeros(len(train), dtype=bool)
    if bool((train.part[usable] == _TEST).any()):
        return np.asarray(train.part == _TEST)
    tested = np.zeros(len(train), dtype=bool)
    group = task * (1 + int(column.max(initial=0))) + column
    tested[usable] = held_out(
        train.content[usable], group[usable], options.test_share, options.seed
    )
    return tested


def _chosen(
    looked: Looked, in_task: Bits, in_part: Bits | None, column: Numbers
) -> tuple[Numbers, Numbers]:
    kept = in_task & (looked.size > 0)
    numbers = np.flatnonzero(kept if in_part is None else kept & in_part)
    if looked.source.is_spread and looked.source.kind == "classify":
        numbers = numbers[spread(column[numbers])]
    return numbers, column[numbers]


def _expect_some(name: str, learned: Hand, scored: Hand, options: MakeOptions) -> None:
    if not len(learned.numbers):
        raise ValueError(
            f"task {name!r} has nothing to learn from in {learned.looked.source.where}: every "
            "sample is in the test part or left out"
        )
    if not len(scored.numbers):
        raise ValueError(
            f"task {name!r} has nothing to test on in {scored.looked.source.where}: give --test, "
            f"or more pictures than its {len(learned.numbers)} samples have"
        )
