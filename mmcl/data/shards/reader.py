"""Reader: random access to the samples of a task, by their number in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmcl.data.errors import BadSample, BadShard
from mmcl.data.protocols import IntArray, Sample, Shard
from mmcl.data.shards.tar_index import IMAGES

MAX_IMAGE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20


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


class Reader:
    """Reader of the samples of one split (train or test) of one task.

    Picklable if its shards are. Takes 8 bytes a shard, and 8 bytes a sample if it is a subset.

    Args:
        shards: in the order of the card.
        chosen: (n,) increasing indices into all shards: samples 0 to n - 1; None = all.

    Attributes:
        shards: in the order of the card.
        chosen: as given.
        sizes: (K,) int64, samples of each shard among those that are read.

    Raises:
        ValueError: if the chosen indices do not increase or are outside the shards.
    """

    def __init__(self, shards: Sequence[Shard], chosen: IntArray | None = None) -> None:
        self.shards = tuple(shards)
        self.chosen = chosen
        self._starts = np.zeros(len(self.shards) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, self.shards), dtype=np.int64), out=self._starts[1:])
        edges = self._starts
        if chosen is not None:
            _expect_increasing(chosen, int(edges[-1]))
            edges = np.searchsorted(chosen, edges)
        self.sizes: IntArray = np.diff(edges)

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
        return shard.read(index)

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        shard, index = self._find(number)
        return shard.key(index)

    def describe(self, number: int) -> str:
        """Describe a sample in a message: ``<key> in <shard>``."""
        shard, index = self._find(number)
        return f"{shown(shard.key(index))} in {shard.name}"

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
            of_shard = _lengths(self.shards[shard], member)
            lengths[order[in_shard]] = of_shard[indices[in_shard] - self._starts[shard]]
        return lengths

    def _find(self, number: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its index there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is outside 0 to {len(self) - 1}")
        index = number if self.chosen is None else int(self.chosen[number])
        shard = int(self._starts.searchsorted(index, side="right")) - 1
        return self.shards[shard], index - int(self._starts[shard])


def expect_length(extension: str, length: int) -> None:
    """Check the size of a member against the limit of its extension.

    Raises:
        BadSample: beyond 256 MiB for an image, 1 MiB for anything else.
    """
    limit = MAX_IMAGE_BYTES if extension in IMAGES else MAX_TEXT_BYTES
    if length > limit:
        raise BadSample(f"its .{extension} has {length} bytes, more than {limit}")


def shown(key: str) -> str:
    """Return a key for a message: on one line, without control characters."""
    return key if key.isprintable() else repr(key)[1:-1]


def are_increasing(indices: IntArray, count: int) -> bool:
    """Return whether (n,) indices strictly increase and are within 0 to ``count`` - 1."""
    if not len(indices):
        return True
    return bool(indices[0] >= 0 and indices[-1] < count and (np.diff(indices) > 0).all())


def _expect_increasing(chosen: IntArray, count: int) -> None:
    if not are_increasing(chosen, count):
        raise ValueError(
            f"chosen goes from {int(chosen[0])} to {int(chosen[-1])} in shards of {count} samples: "
            "give indices that increase and are inside"
        )


def _lengths(shard: Shard, member: str) -> IntArray:
    try:
        return shard.text_bytes(member)
    except BadShard as error:
        raise RuntimeError(f"shard {shard.name} {error}") from None
