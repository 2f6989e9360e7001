"""A shard that is a tar: opened when it is first needed, read through a memory map."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

from mmcl.data.faults import BadShard
from mmcl.data.reader import expect_length
from mmcl.data.shard import Numbers, Origin, Sample
from mmcl.data.shards.index import Hashes, ShardIndex, edges_of, scan, split
from mmcl.data.shards.index_file import index_places, read_index, read_key_hashes, write_index
from mmcl.data.shards.tar import BLOCK, members, plain_header

_MAPS, _REMOTE_MAPS = 128, 8
"""Maps kept open in a process; each holds a file descriptor, and one of a remote shard the disk
space of a file that the cache may have given up."""
_ATTEMPTS = 3
_BUFFER_BYTES = 1 << 12
_LONG_NAMES = (b"path=", b"@LongLink")
"""What stands before a header whose name is not the member's whole name."""
_NEAR = 8 * BLOCK
"""Bytes before a member up to which they are searched for these; beyond, headers are walked."""

_maps: OrderedDict[object, mmap.mmap] = OrderedDict()
_remote_maps: OrderedDict[object, mmap.mmap] = OrderedDict()


class TarShard:
    """The samples of a plain tar; implements ``Shard``.

    Picklable and small then: another process finds the index in its file and maps the tar again.

    Args:
        origin: where the tar lies.
        name: of the shard as the card has it.
        cache: folder for indexes that cannot lie beside their shard; None = keep no index as a
            file, scan the tar in every process.
        count: samples that it holds according to the card; None = open it to know.
    """

    def __init__(
        self, origin: Origin, name: str, cache: Path | None, count: int | None = None
    ) -> None:
        self.origin = origin
        self._name = name
        self._cache = cache
        self._count = count
        self._index: ShardIndex | None = None
        self._edges: bytes | None = None
        self._compared: tuple[int, int] | None = None
        self._map_key = object()

    @property
    def name(self) -> str:
        """Name of the shard as the card has it."""
        return self._name

    @property
    def is_remote(self) -> bool:
        """Whether the shard may have to be fetched."""
        return self.origin.is_remote

    @property
    def index(self) -> ShardIndex:
        """Where its samples lie, from the file of the index or by a scan that writes this file.

        Raises:
            BadShard: if it is no whole tar, cannot be fetched or holds another count of samples.
            OSError: if it cannot be read.
            RuntimeError: if it changed since another process indexed it.
        """
        if self._index is None:
            index = self._stored()
            if index is None:
                index, _ = self._made()
            self._expect_own(index)
            self._index, self._edges = index, index.edges
        return self._index

    @property
    def nbytes(self) -> int:
        """Bytes held for the samples, 0 until the shard is opened."""
        return 0 if self._index is None else self._index.nbytes

    def __len__(self) -> int:
        """Return the number of samples; the stated one until the shard is opened."""
        if self._index is None and self._count is not None:
            return self._count
        return len(self.index)

    def key(self, place: int) -> str:
        """Return the key of a sample; bytes that are not UTF-8 are written in hex.

        Raises:
            RuntimeError: if the shard changed since it was indexed or cannot be opened.
        """
        index = self._opened()
        return self._key(index, self._map(index), place, next(index.members(place)))

    def key_hashes(self) -> Hashes:
        """Return (n,) hashes of the keys, to find repeated ones; they are not kept in RAM.

        Raises:
            BadShard: see ``index``.
        """
        index = self.index
        if index.key_hash is not None:
            return index.key_hash
        stored = read_key_hashes(self._places(), index)
        if stored is not None:
            return stored
        again, made = self._made()
        self._expect_own(again)
        return made

    def read(self, place: int) -> Sample:
        """Return a sample.

        Raises:
            BadSample: if one of its members is too large to be what it says.
            RuntimeError: if the shard changed since it was indexed or cannot be opened.
        """
        index = self._opened()
        data = self._map(index)
        found: dict[str, bytes] = {}
        listed = list(index.members(place))
        for extension, offset, length in listed:
            expect_length(extension, length)
            found[extension] = data[offset : offset + length]
        return Sample(self._key(index, data, place, listed[0]), self._name, found)

    def lengths(self, member: str) -> Numbers:
        """Return (n,) bytes of a member, 0 where a sample has none; see ``Shard``.

        Raises:
            BadShard: see ``index``.
        """
        return self.index.lengths(member)

    def __getstate__(self) -> dict[str, Any]:
        """Leave index and map behind; how the shard began and ended goes along."""
        return {**self.__dict__, "_index": None, "_map_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a name of its own for the map, which belongs to this process."""
        self.__dict__.update(state)
        self._map_key = object()

    def _places(self) -> list[Path]:
        return index_places(self.origin, self._cache)

    def _stored(self) -> ShardIndex | None:
        """Return the index as it was written, None if there is none that fits."""
        places = self._places()
        if self.is_remote:
            found = read_index(places, None)
        else:
            with open_at_once(self.origin) as file:
                found = read_index(places, file)
                self._compared = _mark_of(file)
        # A remote shard may have been replaced since, together with its card.
        return None if found is not None and self._count not in (None, len(found)) else found

    def _made(self) -> tuple[ShardIndex, Hashes]:
        """Scan the shard and write its index."""
        with open_at_once(self.origin) as file:
            self._compared = _mark_of(file)
            index, key_hash = scan(file)
        time = 0 if self.is_remote else self._compared[1]
        return write_index(self._places(), index, key_hash, time), key_hash

    def _expect_own(self, index: ShardIndex) -> None:
        if self._edges not in (None, index.edges):
            raise self._changed()
        if self._count not in (None, len(index)):
            raise BadShard(
                f"holds {len(index)} samples and the card says {self._count}: correct the card "
                "or fetch the shard again"
            )

    def _opened(self) -> ShardIndex:
        """Return the index in the middle of a run, where a fault of the shard ends it."""
        try:
            return self.index
        except BadShard as fault:
            raise RuntimeError(f"shard {self._name} {fault}") from None

    def _map(self, index: ShardIndex) -> mmap.mmap:
        maps, limit = (_remote_maps, _REMOTE_MAPS) if self.is_remote else (_maps, _MAPS)
        # Taken out and put in again, so the first is the one that was not read for longest. It is
        # not closed by hand: another thread may be reading it.
        found = maps.pop(self._map_key, None)
        maps[self._map_key] = found = self._mapped(index) if found is None else found
        if len(maps) > limit:
            maps.popitem(last=False)
        return found

    def _mapped(self, index: ShardIndex) -> mmap.mmap:
        try:
            with open_at_once(self.origin) as file:
                # Reading a map beyond the end of a shrunken file kills the process: look first.
                size = os.fstat(file.fileno()).st_size
                if size != index.size or not self._is_indexed(file, index):
                    raise self._changed()
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except BadShard as fault:
            if self.is_remote:
                raise RuntimeError(f"shard {self._name} {fault}") from None
            raise self._changed() from None

    def _is_indexed(self, file: BinaryIO, index: ShardIndex) -> bool:
        """Tell whether a file is what was indexed; each is compared once."""
        own = _mark_of(file)
        if own != self._compared and edges_of(file, index.size) == index.edges:
            self._compared = own
        return own == self._compared

    def _key(
        self, index: ShardIndex, data: mmap.mmap, place: int, first: tuple[str, int, int]
    ) -> str:
        """Read a key from the headers before the first member of a sample."""
        extension, offset, _ = first
        start = index.before(place)
        between = data[start : offset - BLOCK] if offset - start <= _NEAR else _LONG_NAMES[0]
        if not any(mark in between for mark in _LONG_NAMES):
            header = plain_header(data[offset - BLOCK : offset])
            key, own = split(header.name) if header is not None else (b"", "")
            if own == extension:
                return key.decode("utf-8", "backslashreplace")
        with contextlib.suppress(BadShard):
            walk = members(lambda at, length: data[at : at + length], index.size, start)
            name = next((name for name, begins, _ in walk if begins == offset), b"")
            key, own = split(name)
            if own == extension:
                return key.decode("utf-8", "backslashreplace")
        raise self._changed()

    def _changed(self) -> RuntimeError:
        if self.is_remote:
            for place in self._places():
                place.unlink(missing_ok=True)
        return RuntimeError(
            f"shard {self._name} changed or vanished since it was indexed: leave shards alone "
            "during a run, and start the same command again"
        )


def open_at_once(origin: Origin) -> BinaryIO:
    """Open a shard, fetched again if the cache gave it up before it was open.

    Raises:
        BadShard: if it is missing, cannot be fetched, or vanishes again and again.
        OSError: if it cannot be read.
    """
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            return origin.path().open("rb", buffering=_BUFFER_BYTES)
    raise BadShard(
        f"vanished {_ATTEMPTS} times before it could be opened: give the cache more space, or "
        "stop what empties it"
    )


def _mark_of(file: BinaryIO) -> tuple[int, int]:
    """Return what tells a file from another one of the same name: inode and time in ns."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_mtime_ns
