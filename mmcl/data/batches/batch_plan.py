"""Which samples make up which batch: a function of (seed, task, epoch, step), never a state.

A global batch holds new samples of the task and, each in an exact number of slots, replayed samples
and samples of mixed-in sources. Any batch of any epoch is computed from its number alone.

Ranks: with W ranks and A accumulated micro-batches, micro-batch a of rank r takes the samples
``a * W + r, a * W + r + W * A, ...`` of the global batch. So rank r sees samples r, r + W, ... of
it, and micro-batch a of all ranks together, sample i of rank r at index i * W + r, keeps its order.

Permutations map index to number by slices. Up to a million numbers are sorted by a hash, which is
a uniform permutation and takes as much memory as the numbers. Above, the permutation is a keyed
bijection (a Feistel network over the next power of two, with cycle-walking: Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains"), so ten billion samples are shuffled without a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmcl.core import Task
from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.data.stored_sample import IntArray

SORTED = 1 << 20
"""Largest permutation that is sorted by hash; larger ones go through the Feistel network."""

_ROUNDS = 8
_NEW, _REPLAYED, _SOURCE, _GROUPED = 1, 2, 3, 4
"""Purpose of a permutation, hashed into its seed so that no two purposes share draws."""


class Permutation(Protocol):
    """Permutation of the numbers 0 to n - 1 that is computed by slices."""

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        ...


class Lengths(Protocol):
    """Lengths of entries, such as an array of them."""

    def __getitem__(self, entries: IntArray, /) -> IntArray:
        """Return the lengths (n,) of n entries."""
        ...


def shuffled(seed: int, count: int) -> Permutation:
    """Return a pseudo-random permutation of 0 to ``count`` - 1, the same on every machine."""
    return HashPermutation(seed, count) if count <= SORTED else FeistelPermutation(seed, count)


class HashPermutation:
    """Permutation of the numbers 0 to ``count`` - 1 sorted by their hash.

    Args:
        seed: seed of the permutation.
        count: n.
        turn: number of the permutation among several of the same seed.
    """

    def __init__(self, seed: int, count: int, turn: int = 0) -> None:
        self.seed, self.count, self.turn = seed, count, turn

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        return self._numbers[start:stop]

    @cached_property
    def _numbers(self) -> IntArray:
        hashed = torch.arange(self.turn * self.count, (self.turn + 1) * self.count)
        hashes = hash_priorities(self.seed, 0, hashed)
        numbers: IntArray = hashes.argsort(stable=True).numpy()
        return numbers


class FeistelPermutation:
    """Permutation by a Feistel network; nothing is stored.

    Args:
        seed: seed of the permutation.
        count: n, at least 2.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        bits = max(2, (count - 1).bit_length())
        self._low_bits = bits // 2
        self._low, self._high = (1 << self._low_bits) - 1, (1 << bits - self._low_bits) - 1

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        numbers = self._permuted(torch.arange(start, min(stop, self.count)))
        # Numbers outside of 0 to n - 1 are permuted again: their cycle leads back inside.
        while len(outside := torch.nonzero(numbers >= self.count).flatten()):
            numbers[outside] = self._permuted(numbers[outside])
        taken: IntArray = numbers.numpy()
        return taken

    def _permuted(self, numbers: Tensor) -> Tensor:
        low, high = numbers & self._low, numbers >> self._low_bits
        for turn in range(0, _ROUNDS, 2):
            low = low ^ (hash_priorities(self.seed, turn, high) & self._low)
            high = high ^ (hash_priorities(self.seed, turn + 1, low) & self._high)
        return (high << self._low_bits) | low


class WindowedShuffle:
    """Permutation of shards in random order, their samples shuffled within windows of shards.

    So a reader of remote shards needs ``window`` of them at once and each of them once an epoch.

    Args:
        seed: seed of the permutation.
        sizes: samples of each shard; numbers count through the shards in this order.
        window: shards whose samples are shuffled together, at least 1.
    """

    def __init__(self, seed: int, sizes: Sequence[int] | IntArray, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, expected a number of shards, 1 or more")
        counts = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self._shards = shuffled(hash_seed(seed, 0), len(counts)).slice(0, len(counts))
        self._first = (np.cumsum(counts) - counts)[self._shards]
        self._ends = np.cumsum(counts[self._shards])
        self._window = window
        self._last: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Return the number of samples of all shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        stop = min(stop, len(self))
        pieces = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            window, begin, end = self._window_of(start)
            until = min(end, stop)
            indices = self._inside(window, end - begin).slice(start - begin, until - begin) + begin
            shard = np.searchsorted(self._ends, indices, side="right")
            starts = np.where(shard > 0, self._ends[shard - 1], 0)
            pieces.append(self._first[shard] + indices - starts)
            start = until
        return np.concatenate(pieces)

    def window(self, index: int, ahead: int = 0) -> IntArray:
        """Return the shards of the window that holds an index, or of one after it, by number."""
        if index >= len(self):
            return self._shards[:0]
        first = (self._window_of(index)[0] + ahead) * self._window
        return self._shards[first : first + self._window]

    def _window_of(self, index: int) -> tuple[int, int, int]:
        """Return the window that holds an index, and where it begins and ends."""
        window = int(np.searchsorted(self._ends, index, side="right")) // self._window
        first = window * self._window
        last = min(first + self._window, len(self._ends)) - 1
        return window, int(self._ends[first - 1]) if first else 0, int(self._ends[last])

    def _inside(self, window: int, count: int) -> Permutation:
        if self._last is None or self._last[0] != window:
            self._last = (window, shuffled(hash_seed(self.seed, 1, window), count))
        return self._last[1]


@dataclass(frozen=True)
class Mixture:
    """Composition of the global batches of a task: new, replayed and mixed-in samples.

    Attributes:
        new: samples of the task.
        global_batch_size: samples of a batch over all ranks and accumulated micro-batches, at most.
        num_replay: samples in the replay list.
        replay_ratio: fraction of every batch that they take; None = they are shuffled among the new
            ones.
        sources: (samples, fraction of every batch) of each mixed-in source.
    """

    new: int
    global_batch_size: int
    num_replay: int = 0
    replay_ratio: float | None = None
    sources: tuple[tuple[int, float], ...] = ()

    @cached_property
    def replay_slots(self) -> tuple[int, ...]:
        """Slots of every global batch that replayed samples and each source take.

        Raises:
            ValueError: if no slot is left for new samples.
        """
        fractions = [(self.num_replay, self.replay_ratio or 0.0), *self.sources]
        slots = tuple(
            max(1, round(fraction * self.global_batch_size)) if count and fraction else 0
            for count, fraction in fractions
        )
        if sum(slots) >= self.global_batch_size:
            stated = ", ".join(f"{fraction:g}" for _, fraction in fractions if fraction)
            raise ValueError(
                f"replayed samples and sources take {sum(slots)} of the {self.global_batch_size} "
                f"samples of a global batch (shares {stated}) and leave none for new samples: use "
                "smaller shares or a larger global_batch_size"
            )
        return slots

    @property
    def epoch_samples(self) -> int:
        """Number of samples that come exactly once in an epoch."""
        return self.new + (self.num_replay if self.replay_ratio is None else 0)

    @property
    def steps(self) -> int:
        """Number of global batches of an epoch."""
        return -(-self.epoch_samples // (self.global_batch_size - sum(self.replay_slots)))

    @property
    def min_batch(self) -> int:
        """Number of samples of the smallest global batch of an epoch."""
        return self.epoch_samples // self.steps + sum(self.replay_slots) if self.steps else 0

    def samples_after(self, step: int, epoch_steps: int | None = None) -> int:
        """Return the samples of the first ``step`` global batches, over all epochs.

        Args:
            step: number of batches; with ``group_by_length`` exact at the end of a group, and else
                by at most one sample a batch of the group.
            epoch_steps: batches that are taken of every epoch, None = all.
        """
        length = epoch_steps or max(1, self.steps)
        epochs, rest = divmod(step, length)
        once = epochs * self.start_of(length) + self.start_of(rest)
        return once + step * sum(self.replay_slots)

    def start_of(self, number: int) -> int:
        """Return how many of the samples that come once are used before a batch."""
        return number * self.epoch_samples // max(1, self.steps)


class EpochPlan:
    """The global batches of an epoch, each computed from its number.

    Every new sample comes exactly once, spread so that batch sizes differ by one at most. Replayed
    samples and those of a source are consecutive slices of an endless sequence of permutations of
    their list, which continues from epoch to epoch.

    An *entry* of a batch is a new sample's number; ``new`` + the index of a replayed sample in its
    list; after these the samples of the first source, and so on.

    Args:
        mixture: composition of a batch.
        seed: seed of the run.
        task: index of the task.
        epoch: from 0.
        order: permutation of the samples that come once; None = shuffled.
        lanes: L, if ``order`` takes number p of the samples of a batch from its lane ``p % L``:
            samples are grouped by length inside of every lane.
        lengths: length of every possible entry, see ``group``; None = samples are not grouped by
            length.
        group: batches over which samples are sorted by length before they are cut into batches,
            which then come in random order.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seed: int,
        task: int,
        epoch: int,
        order: Permutation | None = None,
        lanes: int = 1,
        lengths: Lengths | None = None,
        group: int = 0,
    ) -> None:
        self.mixture, self.lanes, self.lengths, self.group = mixture, lanes, lengths, group
        self.order = order or shuffled(hash_seed(seed, task, _NEW, epoch), mixture.epoch_samples)
        self._seed, self._task, self._epoch = seed, task, epoch
        self._window: tuple[int, list[IntArray]] | None = None

    def __len__(self) -> int:
        """Return the number of global batches."""
        return self.mixture.steps

    def batch(self, number: int) -> IntArray:
        """Return the entries of a global batch: new samples, replayed ones, sources in order."""
        if self.lengths is None or self.group < 2:
            return self._concatenated([kind(number, number + 1) for kind in self._kinds])
        window, index = divmod(number, self.group)
        if self._window is None or self._window[0] != window:
            self._window = (window, self._grouped_by_length(window, self.lengths))
        return self._window[1][index]

    @cached_property
    def _kinds(self) -> list[Callable[[int, int], IntArray]]:
        """Functions that fill the slots: each maps batches ``start`` to ``stop`` to entries."""
        kinds: list[Callable[[int, int], IntArray]] = [self._once]
        first, counts = self.mixture.new, [self.mixture.num_replay]
        counts += [count for count, _ in self.mixture.sources]
        for index, (count, slots) in enumerate(zip(counts, self.mixture.replay_slots, strict=True)):
            if slots:
                purpose = (_SOURCE, index) if index else (_REPLAYED,)
                seed = hash_seed(self._seed, self._task, *purpose)
                kinds.append(partial(self._drawn, seed, count, slots, first))
            first += count
        return kinds

    def _once(self, start: int, stop: int) -> IntArray:
        return self.order.slice(self.mixture.start_of(start), self.mixture.start_of(stop))

    def _drawn(
        self, seed: int, count: int, slots: int, first: int, start: int, stop: int
    ) -> IntArray:
        before = self._epoch * self.mixture.steps
        return first + _cycled(seed, count, (before + start) * slots, (stop - start) * slots)

    def _grouped_by_length(self, window: int, lengths: Lengths) -> list[IntArray]:
        """Return the batches of a window, samples of similar length together."""
        start = window * self.group
        stop = min(start + self.group, len(self))
        seed = hash_seed(self._seed, self._task, _GROUPED, self._epoch, window)
        turns = shuffled(seed, stop - start).slice(0, stop - start)
        batches: list[list[IntArray]] = [[] for _ in range(start, stop)]
        for kind in self._kinds:
            lanes = self.lanes if kind == self._once else 1
            sizes = [len(kind(number, number + 1)) for number in range(start, stop)]
            entries, cuts = kind(start, stop), [sizes[turn] for turn in turns.tolist()]
            entries = entries[np.lexsort((lengths[entries], _lanes_of(sizes, lanes)))]
            placed = np.empty_like(entries)
            placed[np.argsort(_lanes_of(cuts, lanes), kind="stable")] = entries
            pieces = np.split(placed, np.cumsum(cuts)[:-1])
            for turn, piece in zip(turns.tolist(), pieces, strict=True):
                batches[turn].append(piece)
        return [self._concatenated(pieces) for pieces in batches]

    def _concatenated(self, pieces: list[IntArray]) -> IntArray:
        entries = np.concatenate(pieces)
        if self.mixture.replay_ratio is None and self.mixture.num_replay:
            is_old = entries >= self.mixture.new
            entries = entries[np.argsort(is_old, kind="stable")]
        return entries


def rank_slice(
    batch: IntArray, micro_batch: int, accumulation: int, rank: int, world: int
) -> IntArray:
    """Return the entries of a global batch that one rank takes in one micro-batch."""
    return batch[micro_batch * world + rank :: world * accumulation]


def _lanes_of(sizes: Sequence[int], lanes: int) -> IntArray:
    """Return the lane of each sample of consecutive batches of these sizes."""
    return np.concatenate([np.arange(size) % lanes for size in sizes])


def _cycled(seed: int, count: int, start: int, length: int) -> IntArray:
    """Return ``length`` indices from ``start`` of the concatenated permutations of a list."""
    pieces = []
    while length:
        turn, offset = divmod(start, count)
        piece = _turn(seed, count, turn).slice(offset, min(count, offset + length))
        pieces.append(piece)
        start, length = start + len(piece), length - len(piece)
    return np.concatenate(pieces)


@lru_cache(maxsize=8)
def _turn(seed: int, count: int, turn: int) -> Permutation:
    """Return one of the permutations of a list."""
    if count > SORTED:
        return shuffled(hash_seed(seed, turn), count)
    return HashPermutation(seed, count, turn)


def expect_samples_for_all(task: Task, mixture: Mixture, accumulation: int, world: int) -> None:
    """Check that every device has a sample in every micro-batch of a task.

    Raises:
        ValueError: if a batch is too small, or a size is below 1.
    """
    given = {"global_batch_size": mixture.global_batch_size, "accumulation": accumulation}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if mixture.min_batch < world * accumulation:
        raise ValueError(
            f"global_batch_size {mixture.global_batch_size} gives task '{task.name}' ({task.size} "
            f"samples) a batch of {mixture.min_batch} samples for {world} devices x {accumulation} "
            "accumulated micro-batches: use fewer devices, less accumulation or a larger "
            "global_batch_size"
        )
