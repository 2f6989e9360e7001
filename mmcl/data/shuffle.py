"""Orders of numbers as functions: place -> number, computed piece by piece, never stored whole.

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

from mmcl.core.randomness import mix, ranks_of
from mmcl.data.shard import Numbers

SORTED = 1 << 20
"""Most numbers that are sorted; more are scattered."""

_ROUNDS = 8


class Order(Protocol):
    """A permutation of 0 to n - 1."""

    def __len__(self) -> int:
        """Return n."""
        ...

    def take(self, start: int, stop: int) -> Numbers:
        """Return the numbers at places ``start`` to ``stop`` - 1."""
        ...


def shuffled(seed: int, count: int) -> Order:
    """Return a pseudo-random order of 0 to ``count`` - 1, the same wherever it is made."""
    return Sorted(seed, count) if count <= SORTED else Scattered(seed, count)


class Sorted:
    """Numbers sorted by their hash.

    Args:
        seed: of the order.
        count: n.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        """Return n."""
        return self.count

    def take(self, start: int, stop: int) -> Numbers:
        """Return the numbers at places ``start`` to ``stop`` - 1."""
        return self._numbers[start:stop]

    @cached_property
    def _numbers(self) -> Numbers:
        ranks = ranks_of(self.seed, 0, torch.arange(self.count))
        order: Numbers = ranks.argsort(stable=True).numpy()
        return order


class Scattered:
    """Numbers run through a bijection; nothing is stored.

    Args:
        seed: of the order.
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

    def take(self, start: int, stop: int) -> Numbers:
        """Return the numbers at places ``start`` to ``stop`` - 1."""
        numbers = self._mixed(torch.arange(start, min(stop, self.count)))
        # What falls outside is sent on along its cycle, which leads back inside.
        while len(outside := torch.nonzero(numbers >= self.count).flatten()):
            numbers[outside] = self._mixed(numbers[outside])
        taken: Numbers = numbers.numpy()
        return taken

    def _mixed(self, numbers: Tensor) -> Tensor:
        low, high = numbers & self._low, numbers >> self._low_bits
        for turn in range(0, _ROUNDS, 2):
            low = low ^ (ranks_of(self.seed, turn, high) & self._low)
            high = high ^ (ranks_of(self.seed, turn + 1, low) & self._high)
        return (high << self._low_bits) | low


class InWindows:
    """Shards in random order, and the samples of so many shards at a time in random order.

    So a reader of remote shards needs ``window`` of them at once and each of them once an epoch.

    Args:
        seed: of the order.
        sizes: samples of each shard; numbers count through the shards as they stand here.
        window: shards whose samples are mixed, at least 1.
    """

    def __init__(self, seed: int, sizes: Sequence[int] | Numbers, window: int) -> None:
        if window < 1:
            raise ValueError(f"window is {window}, expected a number of shards, 1 or more")
        own = np.asarray(sizes, dtype=np.int64)
        self.seed = seed
        self._shards = shuffled(mix(seed, 0), len(own)).take(0, len(own))
        self._first = (np.cumsum(own) - own)[self._shards]
        self._ends = np.cumsum(own[self._shards])
        self._window = window
        self._last: tuple[int, Order] | None = None

    def __len__(self) -> int:
        """Return the samples of all shards."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, start: int, stop: int) -> Numbers:
        """Return the numbers at places ``start`` to ``stop`` - 1."""
        stop = min(stop, len(self))
        pieces = [np.zeros(0, dtype=np.int64)]
        while start < stop:
            window, begin, end = self._around(start)
            until = min(end, stop)
            places = self._inside(window, end - begin).take(start - begin, until - begin) + begin
            shard = np.searchsorted(self._ends, places, side="right")
            starts = np.where(shard > 0, self._ends[shard - 1], 0)
            pieces.append(self._first[shard] + places - starts)
            start = until
        return np.concatenate(pieces)

    def ahead(self, place: int) -> Numbers:
        """Return the shards of the window behind the one that holds a place, by number."""
        behind = (self._around(place)[0] + 1) * self._window if place < len(self) else 0
        return self._shards[behind : behind + self._window] if behind else self._shards[:0]

    def _around(self, place: int) -> tuple[int, int, int]:
        """Return the window that holds a place, and where it begins and ends."""
        window = int(np.searchsorted(self._ends, place, side="right")) // self._window
        first = window * self._window
        last = min(first + self._window, len(self._ends)) - 1
        return window, int(self._ends[first - 1]) if first else 0, int(self._ends[last])

    def _inside(self, window: int, count: int) -> Order:
        if self._last is None or self._last[0] != window:
            self._last = (window, shuffled(mix(self.seed, 1, window), count))
        return self._last[1]
