"""Planning the shards of tasks that were dealt; each is written by itself, in any process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmcl.data.builders.card import card_task
from mmcl.data.builders.shards import Sample, ShardPlan
from mmcl.data.making.dealing import DealtTask, Hand, cuts
from mmcl.data.making.options import MakeOptions
from mmcl.data.making.record import Piece, Record
from mmcl.data.shard import Numbers
from mmcl.data.shards.loose import sample_key


@dataclass(frozen=True)
class PlannedTask:
    """A task before its shards are written.

    Attributes:
        entry: what a card will say of it.
        train: plans of its training shards.
        test: plans of its test shards.
    """

    entry: dict[str, Any]
    train: Sequence[ShardPlan]
    test: Sequence[ShardPlan]


@dataclass(frozen=True)
class _Share:
    """What one shard takes of one piece: a piece with these records alone.

    Attributes:
        piece: of k records.
        numbers: (k,) of the records in their source.
        labels: (k,) card numbers of their classes; None where there are none.
    """

    piece: Piece
    numbers: Numbers
    labels: Numbers | None


def stems(names: Sequence[str]) -> list[str]:
    """Return a start of file names and keys for each task, no two the same."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-") or "task"
        stem, number = plain, 2
        while stem in found:
            stem, number = f"{plain}-{number}", number + 1
        found.append(stem)
    return found


def plan_task(stem: str, task: DealtTask, options: MakeOptions) -> PlannedTask:
    """Plan the shards of a task."""
    train = _plans(f"{stem}-train", task.train, options, bool(task.classes))
    test = _plans(f"{stem}-test", task.test, options, bool(task.classes))
    told = {"classes": list(task.classes)} if task.classes else {}
    return PlannedTask(card_task(task.name, train, test, **told), train, test)


def _plans(stem: str, hand: Hand, options: MakeOptions, has_labels: bool) -> list[ShardPlan]:
    pieces = hand.looked.source.pieces
    ends = np.cumsum([len(piece) for piece in pieces])
    sizes = hand.looked.size[hand.numbers]
    plans = []
    for place, own in enumerate(cuts(sizes, options.shard_samples, options.shard_bytes)):
        order = own.start + np.argsort(hand.numbers[own], kind="stable")
        numbers = hand.numbers[order]
        labels = hand.labels[order] if has_labels else None
        samples = _Samples(stem, pieces, ends, numbers, labels)
        plans.append(ShardPlan(f"{stem}-{place:05d}.tar", len(numbers), samples))
    return plans


@dataclass(frozen=True)
class _Samples:
    """The samples of one shard, when they are called for.

    On its way to another process it turns into the few pieces that the shard needs.
    """

    stem: str
    pieces: Sequence[Piece]
    ends: Numbers
    numbers: Numbers
    labels: Numbers | None

    def __call__(self) -> Iterator[Sample]:
        return _give(self.stem, self.shares())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_give, self.stem, list(self.shares()))

    def shares(self) -> Iterator[_Share]:
        which = np.searchsorted(self.ends, self.numbers, side="right")
        bounds = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(which)]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            number = int(which[first])
            piece = self.pieces[number]
            own = self.numbers[first:last]
            places = own - (int(self.ends[number]) - len(piece))
            labels = None if self.labels is None else self.labels[first:last]
            yield _Share(piece.some(places), own, labels)


def _give(stem: str, shares: Iterable[_Share]) -> Iterator[Sample]:
    for share in shares:
        for place, record in enumerate(share.piece.read()):
            if not isinstance(record, Record):
                raise RuntimeError(
                    f"{record.name or 'a sample'} changed while the stream was made "
                    f"({record.reason}): give the same command again"
                )
            key = sample_key(stem, int(share.numbers[place]), record.name)
            label = {} if share.labels is None else {"cls": str(int(share.labels[place]))}
            yield {"__key__": key, **record.members, **label}
