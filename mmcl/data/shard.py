"""What a reader asks of a shard, wherever it lies: a tar, a copy of a remote one, loose files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """A sample as it lies in its shard.

    Attributes:
        key: its name; bytes that are not UTF-8 are written in hex.
        shard: name of its shard.
        members: extension in lower case -> content.
    """

    key: str
    shard: str
    members: Mapping[str, bytes]


class Origin(Protocol):
    """Where the bytes of a shard come from; picklable.

    Attributes:
        url: a path or an address, for messages and to name what is cached.
        is_remote: whether the shard may have to be fetched, and may vanish from the cache again.
    """

    @property
    def url(self) -> str:
        """See the class."""
        ...

    @property
    def is_remote(self) -> bool:
        """See the class."""
        ...

    def path(self) -> Path:
        """Return a local file that holds the whole shard, fetched (again) if it has to be.

        Open it at once: a file of the cache may be removed as soon as others are needed; what is
        open or mapped stays readable.

        Raises:
            BadShard: if it is missing or cannot be fetched.
        """
        ...


class Shard(Protocol):
    """Samples 0 to n - 1 of one shard; picklable, opened when first read.

    Attributes:
        name: of the shard as the card has it.
        is_remote: see ``Origin``.
    """

    @property
    def name(self) -> str:
        """See the class."""
        ...

    @property
    def is_remote(self) -> bool:
        """See the class."""
        ...

    def __len__(self) -> int:
        """Return n, the number of samples."""
        ...

    def key(self, place: int) -> str:
        """Return the key of a sample."""
        ...

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """Return (n,) hashes of the keys, to find repeated ones."""
        ...

    def read(self, place: int) -> Sample:
        """Return a sample.

        Raises:
            BadSample: if a member is missing, or too large to be what it says.
            RuntimeError: if the shard changed since it was indexed.
        """
        ...

    def lengths(self, member: str) -> Numbers:
        """Return (n,) bytes of a text member, 0 where a sample has none; a guess at token counts.

        Args:
            member: an extension, "txt" or "json" or "de.txt".
        """
        ...
