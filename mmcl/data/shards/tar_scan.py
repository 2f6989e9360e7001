"""Scan of a tar shard: its members become the samples of an index.

Samples follow webdataset's convention: the key is everything up to the first dot of the file name
(folders included), the extension is the rest in lower case. Members of a key that are not adjacent
(``tar`` without ``--sort=name``) are brought together. A card may name any member; pickles, arrays
and compressed members are counted, and never listed or read.
"""

from __future__ import annotations

import os
import re
from array import array
from dataclasses import replace
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from mmcl.core.card import KeyUntil
from mmcl.data.shards.tar import BLOCK, members
from mmcl.data.shards.tar_index import (
    IN_LARGE,
    Hashes,
    ShardIndex,
    head_tail_hash,
    is_read,
)
from mmcl.data.stored_sample import BadShard, IntArray, hash_bytes

MAX_BYTES = BLOCK << 32
"""Largest shard whose blocks can be numbered with 32 bits."""
MAX_EXTENSIONS = 256
_KEY_AND_EXTENSION: dict[KeyUntil, re.Pattern[bytes]] = {
    "first_dot": re.compile(rb"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL),
    "last_dot": re.compile(rb"^((?:.*/|)[^./][^/]*)[.]([^./]*)$", re.DOTALL),
}
_META = re.compile(rb"__[^/]*__($|/)|(.*/)?__MACOSX/", re.DOTALL)


def scan(file: BinaryIO, key_until: KeyUntil = "first_dot") -> tuple[ShardIndex, Hashes]:
    """Index a shard by walking over its headers.

    Args:
        file: a plain tar, open for reading; a buffer of a few KiB holds neighboring headers.
        key_until: where the keys end.

    Returns:
        the index, and (n,) hashes of the keys.

    Raises:
        BadShard: if it is not a whole tar, or too large, or has too many extensions.
        OSError: if it cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        raise BadShard(f"has {size} bytes, more than {MAX_BYTES}: write it in several shards")
    builder = _IndexBuilder()

    def read_range(offset: int, length: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    for name, offset, length in members(read_range, size):
        key, extension = split(name, key_until)
        if extension:
            builder.add(key, extension, offset, length)
    index, key_hash = builder.index(size, head_tail_hash(file, size))
    return replace(index, key_until=key_until), key_hash


def split(name: bytes, key_until: KeyUntil = "first_dot") -> tuple[bytes, str]:
    """Return key and extension of a member name; both are empty for a file that is no member."""
    found = _KEY_AND_EXTENSION[key_until].match(name)
    if found is None or (b"__" in name and _META.match(name)):
        return b"", ""
    key, extension = found.groups()
    return (key, extension.decode("utf-8", "replace").lower()) if extension else (b"", "")


class _IndexBuilder:
    """Index builder: the members of a shard as a scan finds them."""

    def __init__(self) -> None:
        self.first, self.offset, self.length = array("q"), array("q"), array("q")
        self.kind, self.key_hash = array("B"), array("Q")
        self.extensions: dict[str, int] = {}
        self.key: bytes | None = None
        self.own: set[str] = set()
        self.unread: dict[str, int] = {}

    def add(self, key: bytes, extension: str, offset: int, length: int) -> None:
        if not is_read(extension):
            if extension in self.unread or len(self.unread) < MAX_EXTENSIONS:
                self.unread[extension] = self.unread.get(extension, 0) + 1
            return
        # A member named twice starts another sample of the same key, which is reported.
        if key != self.key or extension in self.own:
            self.first.append(len(self.offset))
            self.key_hash.append(hash_bytes(key))
            self.key, self.own = key, set()
        self.own.add(extension)
        self.offset.append(offset)
        self.length.append(length)
        kind = self.extensions.setdefault(extension, len(self.extensions))
        if kind >= MAX_EXTENSIONS:
            raise BadShard(
                f"has more than {MAX_EXTENSIONS} extensions of members, .{extension} for one: a "
                "key ends at the first dot of a file name, so write keys without dots, or set "
                "key_until: last_dot on the card"
            )
        self.kind.append(kind)

    def index(self, size: int, edges: bytes) -> tuple[ShardIndex, Hashes]:
        self.first.append(len(self.offset))
        first, key_hash = np.array(self.first), np.array(self.key_hash, dtype=np.uint64)
        length, block = np.array(self.length), np.array(self.offset) // BLOCK
        kind = np.array(self.kind, dtype=np.uint8)
        owner = _owners(key_hash, first, kind)
        if owner is not None:
            by_sample = np.argsort(np.repeat(owner, np.diff(first)), kind="stable")
            length, block, kind = length[by_sample], block[by_sample], kind[by_sample]
            kept, runs = np.unique(owner, return_inverse=True)
            sizes = np.bincount(runs, weights=np.diff(first)).astype(np.int64)
            first, key_hash = np.concatenate([[0], np.cumsum(sizes)]), key_hash[kept]
        large = np.flatnonzero(length >= IN_LARGE)
        index = ShardIndex(
            size,
            edges,
            tuple(self.extensions),
            first=first.astype(np.uint32),
            block=block.astype(np.uint32),
            length=np.minimum(length, IN_LARGE).astype(np.uint32),
            kind=kind,
            large=np.stack([large, length[large]], axis=1),
            unread=self.unread,
        )
        return index, key_hash


def _owners(key_hash: Hashes, first: IntArray, kind: npt.NDArray[np.uint8]) -> IntArray | None:
    """Find the sample of each run of adjacent members of one key, where keys come again.

    A run belongs to the first sample of its key that has none of its members, so only a key that
    is truly repeated makes two samples.

    Args:
        key_hash: (r,) hash of the key of each run.
        first: (r + 1,) index of each run's first member.
        kind: (m,) extension of each member.

    Returns:
        (r,) number of the first run of its sample; None if every run is a sample.
    """
    owner = np.arange(len(key_hash))
    order = np.argsort(key_hash, kind="stable")
    again = key_hash[order[1:]] == key_hash[order[:-1]]
    samples: list[tuple[int, set[int]]] = []
    for place in np.flatnonzero(again).tolist():
        if place == 0 or not again[place - 1]:
            run = int(order[place])
            samples = [(run, set(kind[first[run] : first[run + 1]].tolist()))]
        run = int(order[place + 1])
        own = set(kind[first[run] : first[run + 1]].tolist())
        fitting = next((sample for sample in samples if sample[1].isdisjoint(own)), None)
        if fitting is None:
            samples.append((run, own))
        else:
            owner[run] = fitting[0]
            fitting[1].update(own)
    return None if np.array_equal(owner, np.arange(len(owner))) else owner
