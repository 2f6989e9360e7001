"""The same picture in training and test: found among fingerprints, 24 bytes a sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmcl.data.shard import Numbers

Prints = npt.NDArray[np.uint64]
"""(n, 3): two halves of a picture's hash (0 without one), then the hash of what is asked of it (0
where nothing is: rows of classes and captions). A sample that cannot be read has three zeros."""

# Odd, so that no two hashes of a question fall together: 2^64 divided by the golden ratio.
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


def print_of(picture: bytes, asked: bytes) -> tuple[int, int, int]:
    """Return the fingerprint of a sample, a row of ``Prints``.

    Args:
        picture: content that tells it from others, empty = none.
        asked: the questions, empty = none.
    """
    halves = hash_of(picture, 16) if picture else 0
    return halves >> 64, halves & (1 << 64) - 1, hash_of(asked) if asked else 0


def hash_of(data: bytes, size: int = 8) -> int:
    """Return ``size`` bytes of the blake2b hash of data as a number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "big")


class TrainedOn:
    """Looks samples up among all samples that are trained on; 40 bytes a sample.

    Args:
        prints: (n, 3) of the training samples.
        by_picture: take samples of one picture for the same, whatever is asked of them.
    """

    def __init__(self, prints: Prints, by_picture: bool = False) -> None:
        self.prints, self.by_picture = prints, by_picture
        keys = self._keys(prints)
        # Stable, so that of several the first in the order of the card is named.
        self._order: Numbers = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def find(self, prints: Prints) -> Numbers:
        """Find the first training sample that is the same as each of (m, 3) prints.

        Returns:
            (m,) its place, -1 where there is none.
        """
        found = np.full(len(prints), -1, dtype=np.int64)
        if len(self.prints) == 0 or len(prints) == 0:
            return found
        keys = self._keys(prints)
        places = np.searchsorted(self._sorted, keys)
        is_near = self._sorted[np.minimum(places, len(self._sorted) - 1)] == keys
        asked = np.flatnonzero(is_near & self._can_have_twins(prints))
        first = self._order[places[asked]]
        found[asked] = np.where(self._same(prints[asked], self.prints[first]), first, -1)
        # Two different samples of one key are as rare as a collision of 64 bits.
        for number in asked[found[asked] < 0]:
            found[number] = self._among(prints[number], int(places[number]), keys[number])
        return found

    def _among(self, wanted: Prints, place: int, key: np.uint64) -> int:
        while place < len(self._sorted) and self._sorted[place] == key:
            if self._same(wanted, self.prints[self._order[place]]):
                return int(self._order[place])
            place += 1
        return -1

    def _keys(self, prints: Prints) -> Prints:
        if self.by_picture:
            return prints[:, 0]
        return prints[:, 0] ^ (prints[:, 2] * _SPREAD)

    def _same(self, left: Prints, right: Prints) -> npt.NDArray[np.bool_]:
        columns = slice(0, 2 if self.by_picture else 3)
        return np.asarray((left[..., columns] == right[..., columns]).all(axis=-1))

    def _can_have_twins(self, prints: Prints) -> npt.NDArray[np.bool_]:
        columns = slice(0, 2 if self.by_picture else 3)
        return np.asarray(prints[:, columns].any(axis=1))


def repeats_of(hashes: npt.NDArray[np.uint64]) -> tuple[Numbers, Numbers]:
    """Find among (n,) hashes those that came before.

    Returns:
        (r,) places of hashes that are not the first of their kind, in order; (r,) places of the
        first of each.
    """
    order: Numbers = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_first = np.ones(len(hashes), dtype=np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    first = order[np.maximum.accumulate(np.where(is_first, np.arange(len(hashes)), 0))]
    later = order[~is_first]
    own_first = first[~is_first]
    back = np.argsort(later)
    return later[back], own_first[back]


def joined(parts: Sequence[Prints], width: int = 3) -> Prints:
    """Put (n, width) arrays one after the other; none give (0, width)."""
    return np.concatenate([np.zeros((0, width), dtype=np.uint64), *parts])
