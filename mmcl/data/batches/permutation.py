"""Pseudo-random permutations of 0 to n - 1 as functions: index -> number, computed by slices.

Up to a million numbers are sorted by a hash, which is a uniform permutation and takes as much
memory as the numbers. Above, the permutation is a keyed bijection (a Feistel network over the
next power of two, with cycle-walking: Black and Rogaway 2002, "Ciphers with Arbitrary Finite
Domains"), so that ten billion samples are shuffled without a list of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.data.protocols import IntArray

SORTED = 1 << 20
"""Largest permutation that is sorted by hash; larger ones go through the Feistel network."""

_ROUNDS = 8


class Permutation(Protocol):
    """A permutation of 0 to n - 1."""

    def __len__(self) -> int:
        """Return n."""
        ...

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        ...


def shuffled(seed: int, count: int) -> Permutation:
    """Return a pseudo-random permutation of 0 to ``count`` - 1, the same on every machine."""
    return HashPermutation(seed, count) if count <= SORTED else FeistelPermutation(seed, count)


class HashPermutation:
    """Permutation of the numbers sorted by their hash.

    Args:
        seed: seed of the permutation.
        count: n.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        """Return n."""
        return self.count

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        return self._numbers[start:stop]

    @cached_property
    def _numbers(self) -> IntArray:
        hashes = hash_priorities(self.seed, 0, torch.arange(self.count))
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

    def __len__(self) -> int:
        """Return n."""
        return self.count

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

    def next_window(self, index: int) -> IntArray:
        """Return the shards of the window after the one that holds an index, by number."""
        first = (self._window_of(index)[0] + 1) * self._window if index < len(self) else 0
        return self._shards[first : first + self._window] if first else self._shards[:0]

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
