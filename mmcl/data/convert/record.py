"""Input records of ``mmcl data convert``, in chunks that any process can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mmcl.data.protocols import IntArray

SPLITS = ("", "train", "test")
"""Splits that an input may state for a record; "" leaves it to the held-out draw."""

ProgressFn = Callable[[str, int, int], None]
"""Progress callback, called with (what is done, samples done, samples in all)."""


@dataclass(frozen=True)
class Record:
    """One sample of an input.

    Attributes:
        name: by which a person finds it in the input, "" if only its number says so.
        members: extension -> content as the shard will hold it; a class is left to ``label``.
        task: stated task, "" if none.
        label: name of its class, "" if it has none.
        split: one of ``SPLITS``.
    """

    name: str
    members: Mapping[str, bytes]
    task: str = ""
    label: str = ""
    split: str = ""


@dataclass(frozen=True)
class InvalidRecord:
    """A bad record.

    Attributes:
        name: by which a person finds it in the input.
        reason: what is wrong with it.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SkippedRecord:
    """A bad sample that was left out: its file, its number there, its id and the reason."""

    file: str
    position: int
    name: str
    reason: str

    def __str__(self) -> str:
        # Ids and paths come from the file: nothing in them may steer a terminal or fill it.
        line = f"{self.file}, sample {self.position} (id '{self.name[:60]}'): {self.reason[:300]}"
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


class Chunk(Protocol):
    """A chunk of an input, about a thousand records; picklable."""

    def __len__(self) -> int:
        """Return n, the number of records."""
        ...

    def subset(self, indices: IntArray) -> Chunk:
        """Return a chunk with only the records at these rising indices, 0 to n - 1."""
        ...

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the records as they are at this moment.

        Raises:
            RuntimeError: if a file changed since the input was opened.
        """
        ...


@dataclass(frozen=True)
class InputData:
    """Input data: a folder, a table or an instruction file.

    Attributes:
        task_type: "classification", "captioning", "retrieval" or "instruction".
        where: path for messages.
        chunks: all chunks.
        classes: in the order of their numbers, if that is known without reading.
        tasks: in their order, if that is known; others come in the order in which they are met.
        interleaved: whether each shard is to hold samples of every class; False where taking
            single records out of a chunk is slow.
    """

    task_type: str
    where: str
    chunks: Sequence[Chunk]
    classes: Sequence[str] = ()
    tasks: Sequence[str] = ()
    interleaved: bool = False
