"""Reader: random access to the samples of a task, or of a subset of them, by their number."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mmcl.core import Task
from mmcl.core.card.schema import escape_unprintable
from mmcl.core.seeding import hash_priorities
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.sample_fields import SampleFields
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadShard, IntArray, Sample, Split, are_increasing

Shard = TarShard | JsonShard
"""Shard of samples 0 to n - 1; picklable, opened when first read."""


def expect_max_samples(max_samples: float | int | None) -> None:
    """Check that ``max_samples`` is a number of samples or a fraction of them.

    Raises:
        ValueError: if it is not a whole number of 1 or more, or above 0 and at most 1.
    """
    if max_samples is None:
        return
    is_fraction = isinstance(max_samples, float) and 0 < max_samples <= 1
    is_count = not isinstance(max_samples, bool) and 1 <= max_samples == int(max_samples)
    if not (is_fraction or is_count):
        raise ValueError(
            f"max_samples is {max_samples!r}, expected a whole number of samples such as 200, or a "
            "fraction such as 0.02"
        )


def subset_size(count: int, max_samples: float | int | None) -> int:
    """Return the size of the subset that ``max_samples`` leaves of ``count`` samples."""
    if max_samples is None:
        return count
    if isinstance(max_samples, float) and max_samples <= 1:
        return min(count, max(1, round(max_samples * count)))
    return min(count, int(max_samples))


def subset_indices(
    task: Task, split: Split, count: int, max_samples: float | int | None, seed: int
) -> IntArray | None:
    """Return the indices of a seeded random subset, in recorded order; None = all samples."""
    kept = subset_size(count, max_samples)
    if kept == count:
        return None
    group = zlib.crc32(f"{split}/{task.name}".encode())
    priorities = hash_priorities(seed, group, torch.arange(count))
    chosen: IntArray = priorities.argsort(stable=True)[:kept].sort().values.numpy()
    return chosen


def validation_size(count: int, validation_share: float) -> int:
    """Return how many of ``count`` training samples are held out: at least one, and not all."""
    return max(1, min(count - 1, round(validation_share * count))) if validation_share else 0


def hold_out(
    reader: Reader, task: Task, validation_share: float, seed: int
) -> tuple[Reader, Reader]:
    """Split the training samples of a task into those to train on and a validation part.

    The samples with the smallest hashes of (seed, task's name, sample) are held out, so the part is
    the same for any order of tasks and any number of processes.

    Raises:
        ValueError: if the share is not between 0 and 1, or the task has one sample, which cannot
            be in both parts.
    """
    if not 0 < validation_share < 1:
        raise ValueError(
            f"validation_share is {validation_share}, expected a fraction from 0 to less than 1"
        )
    count = len(reader)
    if count < 2:
        raise ValueError(
            f"task '{task.name}' has {count} training samples, and validation_share holds some "
            "out: give it 2 or more, or set validation_share to 0"
        )
    recorded = np.arange(count, dtype=np.int64) if reader.chosen is None else reader.chosen
    group = zlib.crc32(f"validation/{task.name}".encode())
    hashes = hash_priorities(seed, group, torch.from_numpy(recorded))
    is_held_out = np.zeros(count, dtype=np.bool_)
    smallest = hashes.argsort(stable=True)[: validation_size(count, validation_share)]
    is_held_out[smallest.numpy()] = True
    parts = recorded[~is_held_out], recorded[is_held_out]
    train, validation = (Reader(reader.shards, part, reader.fields) for part in parts)
    return train, validation


def evenly_spaced(count: int, max_samples: float | int | None) -> IntArray:
    """Return the indices of a subset that is spaced evenly over ``count`` samples."""
    kept = subset_size(count, max_samples)
    return np.arange(kept, dtype=np.int64) * count // max(1, kept)


class SampleReader(Protocol):
    """Protocol of the readers that a loader takes: the shards of a task, or replay copies of it."""

    def read(self, number: int) -> Sample:
        """Return a sample by its number in its task."""
        ...

    def key(self, number: int) -> str:
        """Return the key of a sample, also of one that cannot be read."""
        ...

    def describe(self, number: int) -> str:
        """Describe a sample in a message: ``<key> in <shard>``."""
        ...

    def contains(self, numbers: IntArray) -> npt.NDArray[np.bool_]:
        """Return (R,) bool: whether each of the (R,) sample numbers can be read."""
        ...

    def text_bytes(self, member: str, numbers: IntArray | None = None) -> IntArray:
        """Return (R,) bytes of a text member of the numbered samples, None = of all."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether samples may have to be fetched."""
        ...

    def image_heads(self, number: int, limit: int | None) -> list[bytes]:
        """Return the first bytes of each image of a sample.

        Args:
            number: of the sample.
            limit: bytes of each, None = all; with 0 no image is opened, and each is b"".

        Raises:
            BadSample: if an image is missing.
        """
        ...


class Reader:
    """Reader of the samples of one split (train or test) of one task.

    Picklable if its shards are. Takes 8 bytes a shard, and 8 bytes a sample if it is a subset.

    Args:
        shards: in the order of the card.
        chosen: (n,) increasing indices into all shards: samples 0 to n - 1; None = all.
        fields: of the task, whose members alone are read; None = all members.

    Attributes:
        shards: in the order of the card.
        chosen: as given.
        fields: as given.
        sizes: (K,) int64, samples of each shard among those that are read.
        in_windows: whether training shuffles the shards in windows: if some are remote, or were
            at the first start of a run.

    Raises:
        ValueError: if the chosen indices do not increase or are outside the shards.
    """

    def __init__(
        self, shards: Sequence[Shard], chosen: IntArray | None = None,
        fields: SampleFields | None = None,
    ) -> None:  # fmt: skip
        self.shards = tuple(shards)
        self.chosen, self.fields = chosen, fields
        self._starts = np.zeros(len(self.shards) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, self.shards), dtype=np.int64), out=self._starts[1:])
        edges = self._starts
        if chosen is not None:
            if not are_increasing(chosen, int(edges[-1])):
                raise ValueError(
                    f"chosen goes from {int(chosen[0])} to {int(chosen[-1])} in shards of "
                    f"{int(edges[-1])} samples: give indices that increase and are inside"
                )
            edges = np.searchsorted(chosen, edges)
        self.sizes: IntArray = np.diff(edges)
        self.in_windows = self.is_remote

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._starts[-1]) if self.chosen is None else len(self.chosen)

    @property
    def is_remote(self) -> bool:
        """Whether some of the shards may have to be fetched."""
        return any(shard.is_remote for shard in self.shards)

    def read(self, number: int) -> Sample:
        """Return a sample.

        Args:
            number: 0 to len - 1.

        Raises:
            BadSample: if one of its members is missing or too large for its extension.
            RuntimeError: if the shard changed since it was indexed.
        """
        shard, index = self._find(number)
        return shard.read(index) if self.fields is None else shard.read(index, self.fields)

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        shard, index = self._find(number)
        return shard.key(index)

    def describe(self, number: int) -> str:
        """Describe a sample in a message: ``<key> in <shard>``."""
        return " in ".join(self.name_of(number))

    def name_of(self, number: int) -> tuple[str, str]:
        """Return the key of a sample for messages, and the name of its shard."""
        shard, index = self._find(number)
        return escape_unprintable(shard.key(index)), shard.name

    def contains(self, numbers: IntArray) -> npt.NDArray[np.bool_]:
        """Return (R,) bool: whether each of the (R,) sample numbers can be read."""
        return (numbers >= 0) & (numbers < len(self))

    def text_bytes(self, member: str, numbers: IntArray | None = None) -> IntArray:
        """Return (R,) bytes of a text member of samples, 0 where one has none.

        Args:
            member: an extension, "txt" or "json" or "de.txt".
            numbers: (R,) sample numbers, in any order; None = all.

        Raises:
            RuntimeError: if a shard cannot be opened.
        """
        requested = np.arange(len(self)) if numbers is None else numbers
        order = np.argsort(requested, kind="stable")
        increasing = requested[order]
        indices = increasing if self.chosen is None else self.chosen[increasing]
        edges = np.searchsorted(indices, self._starts)
        lengths = np.zeros(len(requested), dtype=np.int64)
        for shard in np.flatnonzero(np.diff(edges)).tolist():
            in_shard = slice(edges[shard], edges[shard + 1])
            try:
                of_shard = (
                    self.shards[shard].text_bytes(member)
                    if self.fields is None
                    else self.shards[shard].text_bytes(member, self.fields)
                )
            except BadShard as error:
                raise RuntimeError(f"shard {self.shards[shard].name} {error}") from None
            lengths[order[in_shard]] = of_shard[indices[in_shard] - self._starts[shard]]
        return lengths

    def image_heads(self, number: int, limit: int | None) -> list[bytes]:
        """Return the first bytes of each image of a sample; see ``SampleReader``."""
        shard, index = self._find(number)
        return shard.image_heads(index, limit, self.fields)

    def _find(self, number: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its index there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is outside 0 to {len(self) - 1}")
        index = number if self.chosen is None else int(self.chosen[number])
        shard = bisect_right(self._starts, index) - 1  # of one number faster than searchsorted
        return self.shards[shard], index - int(self._starts[shard])
