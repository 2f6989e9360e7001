"""What every source of `mmcl data make` gives: records, in pieces that are read by themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmcl.data.faults import BadSample
from mmcl.data.shard import Numbers

PARTS = ("", "train", "test")
"""What a source may say of a record; "" leaves it to the held-out share."""


@dataclass(frozen=True)
class Record:
    """One sample of a source.

    Attributes:
        name: by which a person finds it in the source, "" if only its number says so.
        members: extension -> content as the shard will hold it; a class is left to ``label``.
        task: that it states, "" if none.
        label: name of its class, "" if it has none.
        part: one of ``PARTS``.
    """

    name: str
    members: Mapping[str, bytes]
    task: str = ""
    label: str = ""
    part: str = ""


@dataclass(frozen=True)
class Unusable:
    """A record with a fault.

    Attributes:
        name: by which a person finds it in the source.
        reason: what is wrong with it.
    """

    name: str
    reason: str

    @classmethod
    def of(cls, name: str, fault: BadSample) -> Unusable:
        """Return the record of a fault."""
        return cls(name, str(fault))


class Piece(Protocol):
    """A stretch of a source, about a thousand records; picklable."""

    def __len__(self) -> int:
        """Return n, the number of records."""
        ...

    def some(self, places: Numbers) -> Piece:
        """Return a piece with the records at rising places, 0 to n - 1, alone."""
        ...

    def read(self) -> Iterator[Record | Unusable]:
        """Give the records as they are at this moment.

        Raises:
            RuntimeError: if a file changed since the source was opened.
        """
        ...


@dataclass(frozen=True)
class Source:
    """Data of somebody's own.

    Attributes:
        kind: "classify", "caption", "retrieve" or "answer".
        where: names it for a person.
        pieces: all of it.
        classes: in the order of their numbers, where that is known without reading.
        tasks: in their order, where that is known; others come in the order in which they are met.
        is_spread: whether each shard is to hold some of every class; not where taking single
            records out of a piece costs much.
    """

    kind: str
    where: str
    pieces: Sequence[Piece]
    classes: Sequence[str] = ()
    tasks: Sequence[str] = ()
    is_spread: bool = False
