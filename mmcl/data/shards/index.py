"""The index of a shard: where every sample's members lie, so that any of them is read at once.

Samples follow webdataset's convention: members of one key stand together, the key is everything up
to the first dot of the file name (folders included), the extension is the rest in lower case. Only
members of known harmless extensions are listed; others, pickles above all, are never read.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mmcl.data.faults import BadShard
from mmcl.data.shard import Numbers
from mmcl.data.shards.tar import BLOCK, Piece, members, padded

IMAGES = ("jpg", "jpeg", "png", "webp")
Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.uint32]

MAX_BYTES = BLOCK << 32
"""Longest shard whose blocks can be numbered."""
IN_LARGE = (1 << 32) - 1
"""Length of a member that is too long for 32 bits."""
MAX_EXTENSIONS = 256
_OTHERS = frozenset({"cls", "txt", "json"})
_EDGE = 1 << 16
_KEY_AND_EXTENSION = re.compile(rb"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")


def is_read(extension: str) -> bool:
    """Tell whether members of this extension are ever looked at."""
    return extension in IMAGES or extension in _OTHERS or extension.endswith(".txt")


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie; n samples of m members in all.

    Takes 4 n + 9 m bytes: 22 for a sample of picture and text. Keys stand in the shard itself, in
    the headers of the members, and their hashes in the file of the index.

    Attributes:
        size: bytes of the shard when it was scanned.
        edges: sha256 of its first and last 64 KiB.
        extensions: that occur in the shard.
        first: (n + 1,) place of each sample's first member in the next three.
        block: (m,) where a member's content starts, in blocks of 512 bytes.
        length: (m,) its bytes, 2**32 - 1 where ``large`` has them.
        kind: (m,) uint8 place of its extension in ``extensions``.
        large: (k, 2) int64 member and true length of those of 4 GiB and more.
        key_hash: (n,) hashes of the keys where no file has them, 8 n bytes more; else None.
    """

    size: int
    edges: bytes
    extensions: tuple[str, ...]
    first: Places
    block: Places
    length: Places
    kind: npt.NDArray[np.uint8]
    large: Numbers
    key_hash: Hashes | None = None

    def __len__(self) -> int:
        """Return n, the number of samples."""
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Bytes held for the samples."""
        arrays = (self.first, self.block, self.length, self.kind, self.large, self.key_hash)
        return sum(held.nbytes for held in arrays if held is not None)

    def members(self, place: int) -> Iterator[tuple[str, int, int]]:
        """Give extension, offset and length of each member of a sample.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= place < len(self):
            raise IndexError(f"sample {place} is outside 0 to {len(self) - 1}")
        for number in range(int(self.first[place]), int(self.first[place + 1])):
            extension = self.extensions[int(self.kind[number])]
            yield extension, int(self.block[number]) * BLOCK, self._length(number)

    def before(self, place: int) -> int:
        """Return the byte behind the last listed member before a sample, where its headers begin.

        Members that are not read may stand between.
        """
        number = int(self.first[place]) - 1
        return 0 if number < 0 else int(self.block[number]) * BLOCK + padded(self._length(number))

    def lengths(self, member: str) -> Numbers:
        """Return (n,) bytes of one member of each sample, 0 where it has none.

        Args:
            member: an extension, "txt" or "json" or "de.txt".
        """
        found = np.zeros(len(self), dtype=np.int64)
        if member.lower() in self.extensions:
            numbers = np.flatnonzero(self.kind == self.extensions.index(member.lower()))
            owner = np.searchsorted(self.first, numbers, side="right") - 1
            found[owner] = self.true_lengths()[numbers]
        return found

    def true_lengths(self) -> Numbers:
        """Return (m,) bytes of every member."""
        lengths = self.length.astype(np.int64)
        lengths[self.large[:, 0]] = self.large[:, 1]
        return lengths

    def _length(self, number: int) -> int:
        length = int(self.length[number])
        if length < IN_LARGE:
            return length
        return int(self.large[np.searchsorted(self.large[:, 0], number), 1])


def scan(file: BinaryIO) -> tuple[ShardIndex, Hashes]:
    """Index a shard by walking over its headers.

    Args:
        file: a plain tar, open for reading; a buffer of a few KiB serves neighbouring headers.

    Returns:
        the index, and (n,) hashes of the keys.

    Raises:
        BadShard: if it is not a whole tar, or too large, or of too many sorts of members.
        OSError: if it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise BadShard(f"has {size} bytes, more than {MAX_BYTES}: write it in several shards")
    found = _Found()
    for name, offset, length in members(piece_of(file), size):
        key, extension = split(name)
        if extension:
            found.add(key, extension, offset, length)
    return found.index(size, edges_of(file, size)), np.array(found.key_hash, dtype=np.uint64)


def piece_of(file: BinaryIO) -> Piece:
    """Return a function that reads a piece of an open file."""

    def piece(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    return piece


def edges_of(file: BinaryIO, size: int) -> bytes:
    """Return the sha256 of the first and the last 64 KiB of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    digest.update(file.read(_EDGE))
    file.seek(max(0, size - _EDGE))
    digest.update(file.read(_EDGE))
    return digest.digest()


def split(name: bytes) -> tuple[bytes, str]:
    """Return key and extension of a member, the extension empty for those that are never read."""
    found = _KEY_AND_EXTENSION.match(name)
    if found is None or _META.match(name):
        return b"", ""
    extension = found[2].decode("ascii", "replace").lower()
    return found[1], extension if is_read(extension) else ""


def hash_of_key(key: bytes) -> int:
    """Return 64 bits that stand for a key where repeated ones are looked for."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


class _Found:
    """The members of a shard as a scan meets them."""

    def __init__(self) -> None:
        self.first, self.offset, self.length = array("q"), array("q"), array("q")
        self.kind, self.key_hash = array("B"), array("Q")
        self.extensions: dict[str, int] = {}
        self.key: bytes | None = None
        self.own: set[str] = set()

    def add(self, key: bytes, extension: str, offset: int, length: int) -> None:
        # A member named twice starts another sample of the same key, which is reported.
        if key != self.key or extension in self.own:
            self.first.append(len(self.offset))
            self.key_hash.append(hash_of_key(key))
            self.key, self.own = key, set()
        self.own.add(extension)
        self.offset.append(offset)
        self.length.append(length)
        kind = self.extensions.setdefault(extension, len(self.extensions))
        if kind >= MAX_EXTENSIONS:
            raise BadShard(
                f"has more than {MAX_EXTENSIONS} sorts of members, .{extension} for one: a key "
                "ends at the first dot of a file name, so write keys without dots"
            )
        self.kind.append(kind)

    def index(self, size: int, edges: bytes) -> ShardIndex:
        self.first.append(len(self.offset))
        length = np.array(self.length, dtype=np.int64)
        large = np.flatnonzero(length >= IN_LARGE)
        return ShardIndex(
            size,
            edges,
            tuple(self.extensions),
            first=np.array(self.first, dtype=np.uint32),
            block=(np.array(self.offset, dtype=np.int64) // BLOCK).astype(np.uint32),
            length=np.minimum(length, IN_LARGE).astype(np.uint32),
            kind=np.array(self.kind, dtype=np.uint8),
            large=np.stack([large, length[large]], axis=1),
        )
