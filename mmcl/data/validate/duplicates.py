"""Duplicate samples, found by fingerprints of 24 bytes: repeated keys, test images in training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mmcl.data.protocols import IntArray

Fingerprints = npt.NDArray[np.uint64]
"""(n, 3): two halves of an image's hash (0 without one), then the hash of its questions (0 without
any: classes and captions). A sample that cannot be read has three zeros."""

# Odd, so that the hashes of no two questions coincide: 2^64 divided by the golden ratio.
_ODD_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def sample_fingerprint(image: bytes, question: bytes) -> tuple[int, int, int]:
    """Return the fingerprint of a sample, a row of ``Fingerprints``.

    Args:
        image: file or pixels, empty = none.
        question: all questions, empty = none.
    """
    halves = hash_of(image, 16) if image else 0
    return halves >> 64, halves & (1 << 64) - 1, hash_of(question) if question else 0


def hash_of(data: bytes, size: int = 8) -> int:
    """Return ``size`` bytes of the blake2b hash of data as a number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "big")


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


def joined(arrays: Sequence[Fingerprints], columns: int = 3) -> Fingerprints:
    """Concatenate (n, columns) arrays; no array gives (0, columns)."""
    return np.concatenate([np.zeros((0, columns), dtype=np.uint64), *arrays])
