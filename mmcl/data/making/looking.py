"""The first pass over data of somebody: every record is read, and only numbers are kept of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mmcl.data.builders.llava_pictures import ends_well
from mmcl.data.builders.llava_survey import Told
from mmcl.data.builders.llava_task import LeftOut
from mmcl.data.decode import MAX_PIXELS, decode_image, size_of
from mmcl.data.faults import BadSample
from mmcl.data.making.processes import Spread
from mmcl.data.making.record import PARTS, Piece, Record, Source, Unusable
from mmcl.data.shard import Numbers
from mmcl.data.shards.index import IMAGES

MAX_LISTED = 10_000
"""Faults that are kept in words; more are only counted."""

_EDGE = 1 << 16
_BLOCK = 512


@dataclass
class Looked:
    """What is known of the n records of a source after a pass; 25 bytes for each.

    Attributes:
        source: they are from.
        size: (n,) bytes that each takes in a shard, 0 where it cannot be used.
        content: (n,) uint64 hash of its picture, of its text where it has none.
        task: (n,) int32 place in ``tasks``.
        label: (n,) int32 place in ``labels``.
        part: (n,) int8 place in ``PARTS``.
        tasks: names of tasks as met.
        labels: names of classes as met.
        left_out: the first ``MAX_LISTED`` that cannot be used.
        digest: sha256 of everything that was read, in hex.
    """

    source: Source
    size: Numbers
    content: npt.NDArray[np.uint64]
    task: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    part: npt.NDArray[np.int8]
    tasks: list[str]
    labels: list[str]
    left_out: list[LeftOut]
    digest: str

    def __len__(self) -> int:
        """Return n."""
        return len(self.size)

    @property
    def faults(self) -> int:
        """How many records cannot be used."""
        return int((self.size == 0).sum())


@dataclass
class _Glance:
    """What one piece showed; lists become arrays, names are numbered in order of appearance."""

    count: int
    tasks: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    unusable: list[tuple[int, Unusable]] = field(default_factory=list)
    digest: bytes = b""

    def __post_init__(self) -> None:
        self.size = np.zeros(self.count, dtype=np.int64)
        self.content = np.zeros(self.count, dtype=np.uint64)
        self.task = np.zeros(self.count, dtype=np.int32)
        self.label = np.zeros(self.count, dtype=np.int32)
        self.part = np.zeros(self.count, dtype=np.int8)


def look_through(source: Source, told: Told, spread: Spread = map) -> Looked:
    """Read a source once.

    Args:
        source: to read.
        told: called after every piece.
        spread: ``map``, or one over processes.

    Raises:
        RuntimeError: if a file changed meanwhile.
    """
    total = sum(map(len, source.pieces))
    tasks: dict[str, int] = {name: place for place, name in enumerate(source.tasks)}
    labels: dict[str, int] = {name: place for place, name in enumerate(source.classes)}
    looked = Looked(
        source, np.zeros(total, np.int64), np.zeros(total, np.uint64), np.zeros(total, np.int32),
        np.zeros(total, np.int32), np.zeros(total, np.int8), [], [], [], "",
    )  # fmt: skip
    digest, first = hashlib.sha256(), 0
    for glance in spread(glance_at, source.pieces):
        own = slice(first, first + glance.count)
        looked.size[own], looked.content[own] = glance.size, glance.content
        looked.part[own] = glance.part
        looked.task[own] = _renumbered(glance.task, glance.tasks, tasks)
        looked.label[own] = _renumbered(glance.label, glance.labels, labels)
        for place, unusable in glance.unusable[: MAX_LISTED - len(looked.left_out)]:
            fault = LeftOut(source.where, first + place, unusable.name, unusable.reason)
            looked.left_out.append(fault)
        digest.update(glance.digest)
        first += glance.count
        told(f"looking through {source.where}", first, total)
    looked.tasks, looked.labels, looked.digest = list(tasks), list(labels), digest.hexdigest()
    return looked


def glance_at(piece: Piece) -> _Glance:
    """Read a piece and keep the numbers."""
    glance, digest = _Glance(len(piece)), hashlib.sha256()
    for place, record in enumerate(_whole(piece)):
        if isinstance(record, Unusable):
            glance.unusable.append((place, record))
            digest.update(b"-")
            continue
        members = sorted(record.members.items())
        shown = [data for name, data in members if name in IMAGES]
        content = hashlib.sha256(shown[0] if shown else b"".join(data for _, data in members))
        glance.content[place] = int.from_bytes(content.digest()[:8], "big")
        for name, data in members:
            glance.size[place] += _BLOCK + -(-len(data) // _BLOCK) * _BLOCK
            held = content.digest() if name in IMAGES else data
            digest.update(f"{name} {len(held)} ".encode() + held)
        stated = (record.name, record.task, record.label, record.part)
        digest.update(repr(stated).encode("utf-8", "surrogateescape"))
        glance.task[place] = glance.tasks.setdefault(record.task, len(glance.tasks))
        glance.label[place] = glance.labels.setdefault(record.label, len(glance.labels))
        glance.part[place] = PARTS.index(record.part)
    glance.digest = digest.digest()
    return glance


def _whole(piece: Piece) -> Iterator[Record | Unusable]:
    """Give the records of a piece, those with a broken picture as unusable."""
    for record in piece.read():
        if isinstance(record, Record):
            try:
                for extension in set(record.members) & set(IMAGES):
                    expect_whole(extension, record.members[extension])
            except BadSample as fault:
                yield Unusable(record.name, str(fault))
                continue
        yield record


def expect_whole(extension: str, data: bytes) -> None:
    """Check a picture by its header and its end, and by decoding it where the end is odd.

    Raises:
        BadSample: if it is broken or has too many pixels.
    """
    height, width = size_of(data)
    if height * width > MAX_PIXELS:
        raise BadSample(f"its picture is {width} x {height}, more than {MAX_PIXELS} pixels")
    if not ends_well(extension, data[:_EDGE], data[-_EDGE:], len(data)):
        decode_image(data)


def _renumbered(
    own: npt.NDArray[np.int32], names: dict[str, int], known: dict[str, int]
) -> npt.NDArray[np.int32]:
    """Turn places in a piece's names into places in the names of all."""
    table: Sequence[int] = [known.setdefault(name, len(known)) for name in names] or [0]
    return np.array(table, dtype=np.int32)[own]
