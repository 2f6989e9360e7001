"""Which samples make up which batch: a function of (seed, task, epoch, position), never a state.

A global batch holds new samples of the task and, each in an exact number of slots, recalled samples
and samples of other sources. Any batch of any epoch is computed from its number alone.

Dealing: with W ranks and A accumulated parts, micro-batch a of rank r takes the rows
``a * W + r, a * W + r + W * A, ...`` of the global batch. So rank r sees rows r, r + W, ... of it,
and the ranks' micro-batches a together, row i of rank r at place i * W + r, keep its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from mmcl.core.randomness import mix, ranks_of
from mmcl.data.shard import Numbers
from mmcl.data.shuffle import SORTED, Order, shuffled

_NEW, _RECALLED, _SOURCE, _GROUPED = 1, 2, 3, 4
"""What a permutation is for; keeps the kinds of draws apart."""


@dataclass(frozen=True)
class Mixture:
    """What the global batches of a task are put together from.

    Attributes:
        new: samples of the task.
        global_batch: rows of a batch over all ranks and accumulated parts, at most.
        recalled: samples in the recalled list.
        share: part of every batch that they take; None = they are shuffled among the new ones.
        sources: (samples, part of every batch) of each other source.
    """

    new: int
    global_batch: int
    recalled: int = 0
    share: float | None = None
    sources: tuple[tuple[int, float], ...] = ()

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """Rows of every global batch that recalled samples and each source take.

        Raises:
            ValueError: if no row is left for new samples.
        """
        shares = [(self.recalled, self.share or 0.0), *self.sources]
        slots = tuple(
            max(1, round(share * self.global_batch)) if count and share else 0
            for count, share in shares
        )
        if sum(slots) >= self.global_batch:
            stated = ", ".join(f"{share:g}" for _, share in shares if share)
            raise ValueError(
                f"recalled samples and sources take {sum(slots)} of the {self.global_batch} rows "
                f"of a global batch (shares {stated}) and leave none for new samples: use smaller "
                "shares or a larger global_batch"
            )
        return slots

    @property
    def once(self) -> int:
        """Samples that come exactly once in an epoch."""
        return self.new + (self.recalled if self.share is None else 0)

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        return -(-self.once // (self.global_batch - sum(self.slots)))

    @property
    def smallest(self) -> int:
        """Rows of the smallest global batch of an epoch."""
        return self.once // self.steps + sum(self.slots) if self.steps else 0

    def edge(self, number: int) -> int:
        """Return how many of the samples that come once stand before a batch."""
        return number * self.once // max(1, self.steps)


class EpochPlan:
    """The global batches of an epoch.

    Every new sample comes exactly once, spread so that batches differ by one row at most. Recalled
    samples and those of a source come in consecutive pieces of an endless row of permutations of
    their list, which goes on from epoch to epoch.

    An *entry* of a batch is a new sample's number; ``new`` + the place of a recalled sample in its
    list; behind these the samples of the first source, and so on.

    Args:
        mixture: what a batch is put together from.
        seed: of the run.
        task: index of the task.
        epoch: from 0.
        order: of what comes once; None = shuffled.
        lengths: (entries,) of all that can come, see ``group``; None = rows are not grouped.
        group: batches over which rows are sorted by their length before they are cut into
            batches, which then come in random order.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        task: int,
        epoch: int,
        order: Order | None = None,
        lengths: Numbers | None = None,
        group: int = 0,
    ) -> None:
        self.mixture, self.lengths, self.group = mixture, lengths, group
        self.order = order or shuffled(mix(seed, task, _NEW, epoch), mixture.once)
        self._seed, self._task, self._epoch = seed, task, epoch
        self._window: tuple[int, list[Numbers]] | None = None

    def __len__(self) -> int:
        """Return the number of global batches."""
        return self.mixture.steps

    def batch(self, number: int) -> Numbers:
        """Return the entries of a global batch: new rows, recalled ones, sources in order."""
        if self.lengths is None or self.group < 2:
            return self._joined([kind(number, number + 1) for kind in self._kinds])
        window, place = divmod(number, self.group)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._like_lengths(window, self.lengths))
        return self._window[1][place]

    def rows(self, number: int) -> int:
        """Return the rows of a global batch."""
        own = self.mixture.edge(number + 1) - self.mixture.edge(number)
        return own + sum(self.mixture.slots)

    @cached_property
    def _kinds(self) -> list[Callable[[int, int], Numbers]]:
        """What fills the slots: each maps batches ``start`` to ``stop`` to their entries."""
        kinds: list[Callable[[int, int], Numbers]] = [self._once]
        first, counts = self.mixture.new, [self.mixture.recalled]
        counts += [count for count, _ in self.mixture.sources]
        for place, (count, slots) in enumerate(zip(counts, self.mixture.slots, strict=True)):
            if slots:
                draw = (_SOURCE, place) if place else (_RECALLED,)
                seed = mix(self._seed, self._task, *draw)
                kinds.append(self._endless(seed, count, slots, first))
            first += count
        return kinds

    def _once(self, start: int, stop: int) -> Numbers:
        return self.order.take(self.mixture.edge(start), self.mixture.edge(stop))

    def _endless(
        self, seed: int, count: int, slots: int, first: int
    ) -> Callable[[int, int], Numbers]:
        before = self._epoch * self.mixture.steps

        def drawn(start: int, stop: int) -> Numbers:
            rows = _endless(seed, count, (before + start) * slots, (stop - start) * slots)
            return rows + first

        return drawn

    def _like_lengths(self, window: int, lengths: Numbers) -> list[Numbers]:
        """Return the batches of a window, rows of like length together."""
        start = window * self.group
        stop = min(start + self.group, len(self))
        draw = mix(self._seed, self._task, _GROUPED, self._epoch, window)
        turns = shuffled(draw, stop - start).take(0, stop - start)
        batches: list[list[Numbers]] = [[] for _ in range(start, stop)]
        for kind in self._kinds:
            rows = kind(start, stop)
            rows = rows[np.argsort(lengths[rows], kind="stable")]
            sizes = [len(kind(start + turn, start + turn + 1)) for turn in turns.tolist()]
            pieces = np.split(rows, np.cumsum(sizes)[:-1])
            for turn, piece in zip(turns.tolist(), pieces, strict=True):
                batches[turn].append(piece)
        return [self._joined(pieces) for pieces in batches]

    def _joined(self, pieces: list[Numbers]) -> Numbers:
        rows = np.concatenate(pieces)
        if self.mixture.share is None and self.mixture.recalled:
            is_old = rows >= self.mixture.new
            rows = rows[np.argsort(is_old, kind="stable")]
        return rows


def dealt(batch: Numbers, part: int, accumulation: int, rank: int, world: int) -> Numbers:
    """Return the entries of a global batch that one rank takes in one accumulated part."""
    return batch[part * world + rank :: world * accumulation]


def _endless(seed: int, count: int, start: int, rows: int) -> Numbers:
    """Return places ``start`` to ``start + rows`` of the permutations of a list, put end to end."""
    pieces = []
    while rows:
        turn, place = divmod(start, count)
        taken = _turn(seed, count, turn).take(place, min(count, place + rows))
        pieces.append(taken)
        start, rows = start + len(taken), rows - len(taken)
    return np.concatenate(pieces)


@lru_cache(maxsize=8)
def _turn(seed: int, count: int, turn: int) -> Order:
    """Return one of the permutations of a list."""
    if count > SORTED:
        return shuffled(mix(seed, turn), count)
    return _Listed(seed, count, turn)


class _Listed:
    """A list sorted by hashes that go on from turn to turn."""

    def __init__(self, seed: int, count: int, turn: int) -> None:
        keys = ranks_of(seed, 0, torch.arange(turn * count, (turn + 1) * count))
        self._numbers: Numbers = keys.argsort(stable=True).numpy()

    def __len__(self) -> int:
        return len(self._numbers)

    def take(self, start: int, stop: int) -> Numbers:
        return self._numbers[start:stop]
