"""Random access to the samples of a task, through memory maps of its shards."""

from __future__ import annotations

import bisect
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mmcl.data.faults import BadSample
from mmcl.data.index import IMAGES, ShardIndex
from mmcl.data.shard import Numbers, Sample

MAX_PICTURE_BYTES = 1 << 28
MAX_TEXT_BYTES = 1 << 20
_OPEN_SHARDS = 128
"""Maps kept open at a time; each holds a file descriptor."""


class SampleReader(Protocol):
    """What a loader asks of the place where samples lie."""

    def read(self, number: int) -> Sample:
        """Return a sample by its number inside its task."""
        ...

    def where(self, number: int) -> str:
        """Name a sample for a person: ``<key> in <shard>``."""
        ...

    def holds(self, numbers: Numbers) -> np.ndarray:
        """Tell for (R,) sample numbers whether each can be read: (R,) bool."""
        ...


class Reader:
    """Reads the samples of one part (train or test) of one task.

    Picklable: a worker opens the shards again when it first needs them.

    Args:
        shards: the indexes, in the order of the card.
        chosen: (n,) positions in all shards that are samples 0 to n - 1; None = all of them.
    """

    def __init__(self, shards: Sequence[ShardIndex], chosen: Numbers | None = None) -> None:
        self.shards = tuple(shards)
        self.chosen = chosen
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + len(shard))
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._starts[-1] if self.chosen is None else len(self.chosen)

    def read(self, number: int) -> Sample:
        """Return a sample.

        Args:
            number: 0 to len - 1.

        Raises:
            BadSample: if one of its members is too large to be what it says.
            RuntimeError: if the shard changed since it was indexed.
        """
        place, own = self._place(number)
        shard = self.shards[place]
        data = self._map(place)
        found: dict[str, bytes] = {}
        for extension, offset, length in shard.members(own):
            limit = MAX_PICTURE_BYTES if extension in IMAGES else MAX_TEXT_BYTES
            if length > limit:
                raise BadSample(f"its .{extension} has {length} bytes, more than {limit}")
            found[extension] = data[offset : offset + length]
        return Sample(shard.key(own), shard.name, found)

    def where(self, number: int) -> str:
        """Name a sample for a person: ``<key> in <shard>``."""
        place, own = self._place(number)
        return f"{self.shards[place].key(own)} in {self.shards[place].name}"

    def holds(self, numbers: Numbers) -> np.ndarray:
        """Tell for (R,) sample numbers whether each can be read: (R,) bool."""
        return (numbers >= 0) & (numbers < len(self))

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open maps behind, they belong to this process."""
        return {**self.__dict__, "_maps": OrderedDict()}

    def _place(self, number: int) -> tuple[int, int]:
        """Return the shard of a sample and its place there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} is outside 0 to {len(self) - 1}")
        position = number if self.chosen is None else int(self.chosen[number])
        place = bisect.bisect_right(self._starts, position) - 1
        return place, position - self._starts[place]

    def _map(self, place: int) -> mmap.mmap:
        if place in self._maps:
            self._maps.move_to_end(place)
            return self._maps[place]
        shard = self.shards[place]
        # Reading a map beyond the end of a shrunken file kills the process, so look first.
        if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
            raise RuntimeError(
                f"shard {shard.path} changed or vanished since it was indexed: leave shards "
                "alone during a run, and start the same command again"
            )
        with shard.path.open("rb") as file:
            self._maps[place] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self._maps) > _OPEN_SHARDS:
            self._maps.popitem(last=False)[1].close()
        return self._maps[place]
