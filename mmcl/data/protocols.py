"""Protocols of shards and of their locations: a local tar, a cached remote one, or a JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Sample:
    """A sample as it is stored in its shard.

    Attributes:
        key: its key; bytes that are not UTF-8 are written in hex.
        shard: name of its shard.
        members: extension in lower case -> content.
    """

    key: str
    shard: str
    members: Mapping[str, bytes]


class ShardLocation(Protocol):
    """Location of the bytes of a shard; picklable.

    Attributes:
        url: a path or URL, for messages and for the names of cached files.
        is_remote: whether the shard may have to be fetched, and may be evicted from the cache.
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
        """Return a local file that holds the whole shard, fetched (again) if necessary.

        Open it at once: a cached file may be evicted as soon as others are needed; an open or
        mapped file stays readable.

        Raises:
            BadShard: if it is missing or cannot be fetched.
        """
        ...


class Shard(Protocol):
    """Protocol of a shard: samples 0 to n - 1; picklable, opened when first read.

    Attributes:
        name: name of the shard on the card.
        is_remote: see ``ShardLocation``.
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

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        ...

    def key_hashes(self) -> npt.NDArray[np.uint64]:
        """Return (n,) hashes of the keys, to find repeated keys."""
        ...

    def read(self, index: int) -> Sample:
        """Return a sample.

        Raises:
            BadSample: if a member is missing, or too large for its extension.
            RuntimeError: if the shard changed since it was indexed.
        """
        ...

    def text_bytes(self, member: str) -> IntArray:
        """Return (n,) bytes of a text member, 0 where a sample has none; estimates token counts.

        Args:
            member: an extension, "txt" or "json" or "de.txt".
        """
        ...
