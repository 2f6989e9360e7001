"""Sample as a shard stores it, and the errors of samples, shards and streams."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mmcl.core import BadSample as BadSample

IntArray = npt.NDArray[np.int64]
Split = Literal["train", "validation", "test"]

MAX_TEXT_BYTES = 1 << 20
"""Samples with a longer text member are bad."""

NAMED = 5
"""Errors of one sort that are written in full; the others are only counted."""


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


class BadShard(ValueError):
    """One shard cannot be used; its text is the reason, without the shard's name."""


class ErrorList:
    """List of everything that is wrong with a stream, to be reported at once.

    Attributes:
        lines: errors, and lines that only count more of a sort.
        count: number of errors, those that are only counted as well.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0

    def add(self, line: str, count: int = 1) -> None:
        """Add an error, or a line for ``count`` of them, unless it is listed or empty."""
        if line and line not in self.lines:
            self.lines.append(line)
            self.count += count

    def add_some(self, lines: Sequence[str], what: str, count: int | None = None) -> None:
        """Add errors of one sort: the first ``NAMED`` in full, the others as a count.

        Args:
            lines: one for every error, or at least for the first ``NAMED``.
            what: names the sort in the last line, such as "repeated keys in task 'zero-one'".
            count: errors of this sort; None = as many as lines.
        """
        for line in lines[:NAMED]:
            self.add(line)
        more = (len(lines) if count is None else count) - NAMED
        if more > 0:
            self.add(f"and {more} more {what}", more)

    def raise_all(self, stream: str) -> None:
        """Raise one exception that lists every error, if there is any.

        Raises:
            ValueError: a line for each error.
        """
        if self.lines:
            listed = "\n".join(f"  - {line}" for line in self.lines)
            raise ValueError(f"stream '{stream}' has {count_errors(self.count)}:\n{listed}")


def count_errors(count: int) -> str:
    """Return the number of errors in words: "1 error", "2 errors"."""
    return "1 error" if count == 1 else f"{count} errors"


def hash_bytes(data: bytes, size: int = 8) -> int:
    """Return ``size`` bytes of the blake2b hash of data as a number."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "big")


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line, at most 200 characters."""
    return " ".join(str(error).split())[:200]


def are_increasing(indices: IntArray, count: int) -> bool:
    """Return whether (n,) indices strictly increase and are within 0 to ``count`` - 1."""
    if not len(indices):
        return True
    return bool(indices[0] >= 0 and indices[-1] < count and (np.diff(indices) > 0).all())
