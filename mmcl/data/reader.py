"""Random access to the samples of a task, by their number inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mmcl.data.faults import BadSample, BadShard
from mmcl.data.shard import Numbers, Sample, Shard
from mmcl.data.shards.index import IMAGES

MAX_PICTURE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20


class SampleReader(Protocol):
    """What a loader asks of the place where samples lie."""

    def read(self, number: int) -> Sample:
        """Return a sample by its number inside its task."""
        ...

    def key(self, number: int) -> str:
        """Return the key of a sample, also of one that cannot be read."""
        ...

    def where(self, number: int) -> str:
        """Name a sample for a person: ``<key> in <shard>``."""
        ...

    def holds(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Tell for (R,) sample numbers whether each can be read: (R,) bool."""
        ...

    def lengths(self, member: str, numbers: Numbers | None = None) -> Numbers:
        """Return (R,) bytes of a text member of the numbered samples, None = of all."""
        ...


class Reader:
    """Reads the samples of one part (train or test) of one task.

    Picklable if its shards are. Takes 8 bytes a shard, and 8 bytes a sample if some are chosen.

    Args:
        shards: in the order of the card.
        chosen: (n,) rising positions in all shards that are samples 0 to n - 1; None = all.

    Attributes:
        shards: in the order of the card.
        chosen: as given.
        sizes: (K,) int64, samples of each shard among those that are read.

    Raises:
        ValueError: if the chosen positions do not rise or lie outside the shards.
    """

    def __init__(self, shards: Sequence[Shard], chosen: Numbers | None = None) -> None:
        self.shards = tuple(shards)
        self.chosen = chosen
        self._starts = np.zeros(len(self.shards) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, self.shards), dtype=np.int64), out=self._starts[1:])
        edges = self._starts
        if chosen is not None:
            _expect_rising(chosen, int(edges[-1]))
            edges = np.searchsorted(chosen, edges)
        self.sizes: Numbers = np.diff(edges)

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
            BadSample: if one of its members is missing or too large to be what it says.
            RuntimeError: if the shard changed since it was indexed.
        """
        shard, place = self._place(number)
        return shard.read(place)

    def key(self, number: int) -> str:
        """Return the key of a sample."""
        shard, place = self._place(number)
        return shard.key(place)

    def where(self, number: int) -> str:
        """Name a sample for a person: ``<key> in <shard>``."""
        shard, place = self._place(number)
        return f"{shown(shard.key(place))} in {shard.name}"

    def holds(self, numbers: Numbers) -> npt.NDArray[np.bool_]:
        """Tell for (R,) sample numbers whether each can be read: (R,) bool."""
        return (numbers >= 0) & (numbers < len(self))

    def lengths(self, member: str, numbers: Numbers | None = None) -> Numbers:
        """Return (R,) bytes of a text member of samples, 0 where one has none.

        Args:
            member: an extension, "txt" or "json" or "de.txt".
            numbers: (R,) of the samples, in any order; None = of all.

        Raises:
            RuntimeError: if a shard cannot be opened.
        """
        asked = np.arange(len(self)) if numbers is None else numbers
        order = np.argsort(asked, kind="stable")
        rising = asked[order]
        positions = rising if self.chosen is None else self.chosen[rising]
        edges = np.searchsorted(positions, self._starts)
        found = np.zeros(len(asked), dtype=np.int64)
        for place in np.flatnonzero(np.diff(edges)).tolist():
            here = slice(edges[place], edges[place + 1])
            own = _lengths(self.shards[place], member)
            found[order[here]] = own[positions[here] - self._starts[place]]
        return found

    def _place(self, number: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its place there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is outside 0 to {len(self) - 1}")
        position = number if self.chosen is None else int(self.chosen[number])
        place = int(self._starts.searchsorted(position, side="right")) - 1
        return self.shards[place], position - int(self._starts[place])


def expect_length(extension: str, length: int) -> None:
    """Refuse a member that is too large to be what it says.

    Raises:
        BadSample: beyond 256 MiB for a picture, 1 MiB for anything else.
    """
    limit = MAX_PICTURE_BYTES if extension in IMAGES else MAX_TEXT_BYTES
    if length > limit:
        raise BadSample(f"its .{extension} has {length} bytes, more than {limit}")


def shown(key: str) -> str:
    """Return a key for a message: on one line, without what a terminal would obey."""
    return key if key.isprintable() else repr(key)[1:-1]


def _expect_rising(chosen: Numbers, count: int) -> None:
    if len(chosen) and not (chosen[0] >= 0 and chosen[-1] < count and (np.diff(chosen) > 0).all()):
        raise ValueError(
            f"chosen goes from {int(chosen[0])} to {int(chosen[-1])} in shards of {count} samples: "
            "give positions that rise and lie inside"
        )


def _lengths(shard: Shard, member: str) -> Numbers:
    try:
        return shard.lengths(member)
    except BadShard as fault:
        raise RuntimeError(f"shard {shard.name} {fault}") from None
