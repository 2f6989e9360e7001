"""Tar shard: opened when it is first needed, read through a memory map."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmcl.core.card import KeyUntil
from mmcl.data.remote.location import ShardLocation
from mmcl.data.shards.image_folder import extension_of
from mmcl.data.shards.sample_fields import (
    SampleFields,
    StoredAs,
    UnfitMembers,
    dotted,
    two_images,
)
from mmcl.data.shards.tar import BLOCK, members, plain_header
from mmcl.data.shards.tar_index import (
    IMAGES,
    Hashes,
    ShardIndex,
    head_tail_hash,
    index_paths,
    read_index,
    read_key_hashes,
    write_index,
)
from mmcl.data.shards.tar_scan import scan, split
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, BadShard, IntArray, Sample

MAX_IMAGE_MEMBER_BYTES = 1 << 28
"""Samples with a longer image member are bad."""

_MAPS, _REMOTE_MAPS = 128, 8
"""Memory maps kept open in a process; each holds a file descriptor, and one of a remote shard also
the disk space of a file that the cache may have evicted."""
_ATTEMPTS = 3
_BUFFER_BYTES = 1 << 12
_PAX_PATH, _GNU_NAME = b"path=", b"@LongLink"
"""Bytes that occur before a header whose name field is not the member's whole name."""
_START_BYTES = 64
"""Bytes by which an image is recognized."""
_NEAR = 8 * BLOCK
"""Most bytes before a member that are searched for these; beyond, the headers are walked."""

_maps: OrderedDict[object, mmap.mmap] = OrderedDict()
_remote_maps: OrderedDict[object, mmap.mmap] = OrderedDict()


class TarShard:
    """Shard of the samples of a plain tar.

    Picklable without its index: another process reads the index file and maps the tar again.

    Args:
        origin: location of the tar.
        name: name of the shard on the card.
        cache: cache folder for indexes that cannot be next to their shard; None = no index files,
            every process scans the tar.
        count: number of its samples on the card; None = not stated, open the tar to count them.
        key_until: where the keys of its samples end.
    """

    def __init__(
        self, origin: ShardLocation, name: str, cache: Path | None, count: int | None = None,
        key_until: KeyUntil = "first_dot",
    ) -> None:  # fmt: skip
        self.origin, self.name, self.key_until = origin, name, key_until
        self.is_remote = origin.is_remote
        self._cache = cache
        self._count = count
        self._index: ShardIndex | None = None
        self._edges: bytes | None = None
        self._compared: tuple[int, int] | None = None
        self._map_key = object()
        self._members: dict[SampleFields, dict[str, StoredAs]] = {}
        self._latest: tuple[SampleFields, dict[str, StoredAs]] | None = None

    @property
    def index(self) -> ShardIndex:
        """Index of the samples, from the index file or by a scan that writes this file.

        Raises:
            BadShard: if it is no whole tar, cannot be fetched or has another number of samples.
            OSError: if it cannot be read.
            RuntimeError: if it changed since another process indexed it.
        """
        if self._index is None:
            index = self._read_index()
            if index is None:
                index, _ = self._scan()
            self._expect_unchanged(index)
            self._index, self._edges = index, index.head_tail_hash
        return self._index

    @property
    def nbytes(self) -> int:
        """Bytes of the index in memory, 0 until the shard is opened."""
        return 0 if self._index is None else self._index.nbytes

    def __len__(self) -> int:
        """Return the number of samples; the stated one until the shard is opened."""
        if self._index is None and self._count is not None:
            return self._count
        return len(self.index)

    def key(self, index: int) -> str:
        """Return the key of a sample; bytes that are not UTF-8 are written in hex.

        Raises:
            RuntimeError: if the shard changed since it was indexed or cannot be opened.
        """
        shard_index = self._opened()
        first = shard_index.members(index)[0]
        return self._key(shard_index, self._map(shard_index), index, first)

    def key_hashes(self) -> Hashes:
        """Return (n,) hashes of the keys, to find repeated keys; they are not kept in memory."""
        index = self.index
        if index.key_hash is not None:
            return index.key_hash
        stored = read_key_hashes(self._index_paths(), index)
        if stored is not None:
            return stored
        scanned, hashes = self._scan()
        self._expect_unchanged(scanned)
        return hashes

    def read(self, index: int, fields: SampleFields | None = None) -> Sample:
        """Return a sample.

        Args:
            index: 0 to n - 1.
            fields: read only the members of these, under their usual names: the image under its
                format, the label as "cls"; None = all members, under their own.

        Raises:
            BadSample: if one of its members is too large for its extension, or a field of it has
                none or several.
            RuntimeError: if the shard changed since it was indexed or cannot be opened.
        """
        shard_index = self._opened()
        data = self._map(shard_index)
        listed = shard_index.members(index)
        key = self._key(shard_index, data, index, listed[0])
        if fields is not None:
            return Sample(key, self.name, self._read_fields(data, listed, fields))
        own: dict[str, bytes] = {}
        for extension, offset, length in listed:
            limit = MAX_IMAGE_MEMBER_BYTES if _is_image(extension) else MAX_TEXT_BYTES
            if length > limit:
                raise _too_long(extension, length, limit)
            own[extension] = data[offset : offset + length]
        return Sample(key, self.name, own)

    def members(self, fields: SampleFields) -> dict[str, StoredAs]:
        """Return the members that hold these fields: extension -> its use.

        Raises:
            UnfitMembers: if there are none or several that may be meant.
            BadShard: as ``index``.
        """
        found = self._members.get(fields)
        if found is None:
            extensions = self.index.extensions
            found = fields.members(extensions, self._holds_image)
            if len(self.index):
                read_json = partial(self._first, "json", MAX_TEXT_BYTES)
                try:
                    fields.expect_required(found, extensions, read_json)
                except UnfitMembers as error:
                    unread = dotted(self.index.unread)
                    more = f"; never read: {unread}" if unread else ""
                    raise UnfitMembers(f"{error}{more}") from None
            self._members[fields] = found
        return found

    def field_error(self, fields: SampleFields) -> str:
        """Return why a task cannot take its fields from this shard, "" if it can."""
        try:
            found = self.members(fields)
        except UnfitMembers as error:
            return str(error)
        images = {name for name, use in found.items() if use.field == "image"}
        several = self.index.several(images)
        numbered = {name for name in images if fields.has_several(name)}
        if numbered:
            plain = self.index.several(images - numbered, least=1)
            several = several[np.isin(several, plain)]
        if fields.image or len(several) == 0:
            return ""
        first = [name for name, _, _ in self.index.members(int(several[0])) if name in images]
        return two_images(first)

    def text_bytes(self, member: str, fields: SampleFields | None = None) -> IntArray:
        """Return (n,) bytes of a member, "txt" or "json" or "de.txt", 0 where a sample has none.

        With ``fields`` it is the member that holds their text, whatever its name.
        """
        if fields is None:
            return self.index.lengths(member)
        try:
            found = self.members(fields)
        except UnfitMembers:
            return np.zeros(len(self), dtype=np.int64)
        lengths = np.zeros(len(self), dtype=np.int64)
        for name in (name for name, use in found.items() if use.field == "text"):
            lengths = np.maximum(lengths, self.index.lengths(name))
        return lengths

    def image_heads(
        self, index: int, limit: int | None, fields: SampleFields | None = None
    ) -> list[bytes]:
        """Return the first ``limit`` bytes of each image of a sample, None = all of them."""
        shard_index = self._opened()
        data, listed = self._map(shard_index), shard_index.members(index)
        if fields is not None:
            try:
                uses = self.members(fields)
            except UnfitMembers as error:
                raise BadSample(f"its shard {error}") from None
            listed = _preferred(listed, uses) if fields.has_alternatives else listed
            listed = [each for each in listed if each[0] in uses and uses[each[0]].field == "image"]
        else:
            listed = [each for each in listed if _is_image(each[0])]
        longest = MAX_IMAGE_MEMBER_BYTES if limit is None else limit
        return [data[offset : offset + min(length, longest)] for _, offset, length in listed]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out index and map; the hash of the shard's first and last bytes is included."""
        own: dict[str, Any] = {"_index": None, "_map_key": None, "_members": {}, "_latest": None}
        return {**self.__dict__, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Create a new key for the map, which belongs to this process."""
        self.__dict__.update(state)
        self._map_key = object()

    def _read_fields(
        self, data: mmap.mmap, listed: list[tuple[str, int, int]], fields: SampleFields
    ) -> dict[str, bytes]:
        """Return the members of a sample that hold its fields, under their usual names."""
        # By identity: a reader gives the same object for every sample, and hashing it takes time.
        if self._latest is None or self._latest[0] is not fields:
            try:
                self._latest = fields, self.members(fields)
            except UnfitMembers as error:
                raise BadSample(f"its shard {error}") from None
        uses, images, members = self._latest[1], 0, listed
        own: dict[str, bytes] = {}
        if fields.has_alternatives:
            members = _preferred(listed, uses)
        for extension, offset, length in members:
            if extension not in uses:
                continue
            field, _, name = uses[extension]
            limit = MAX_TEXT_BYTES
            if field == "image":
                limit, images = MAX_IMAGE_MEMBER_BYTES, images + 1
            if length > limit:
                raise _too_long(extension, length, limit)
            content = data[offset : offset + length]
            own[name or extension_of(content)] = content
        if images > 1 or len(own) != len(fields.used):
            self._expect_fields(fields, uses, [extension for extension, _, _ in listed])
        return own

    @staticmethod
    def _expect_fields(fields: SampleFields, uses: dict[str, StoredAs], listed: list[str]) -> None:
        """Check that a sample has every required field, and no field twice."""
        images = [name for name in listed if name in uses and uses[name].field == "image"]
        if len(images) > 1 and not fields.image and not all(map(fields.has_several, images)):
            raise BadSample(f"it {two_images(images)}")
        for field in fields.required:
            if not any(uses[name].field == field for name in listed if name in uses):
                raise BadSample(fields.missing(field, uses, listed))

    def _holds_image(self, extension: str) -> bool:
        try:
            extension_of(self._first(extension, _START_BYTES))
        except BadSample:
            return False
        return True

    def _first(self, extension: str, limit: int) -> bytes:
        """Return at most ``limit`` bytes of the first member of an extension."""
        index = self.index
        member = int((index.kind == index.extensions.index(extension)).argmax())
        start = int(index.block[member]) * BLOCK
        return self._map(index)[start : start + min(int(index.length[member]), limit)]

    def _index_paths(self) -> list[Path]:
        return index_paths(self.origin, self._cache)

    def _read_index(self) -> ShardIndex | None:
        """Return the index from its file, None if there is no valid one."""
        paths = self._index_paths()
        if self.is_remote:
            index = read_index(paths, None, self.key_until)
        else:
            with open_at_once(self.origin) as file:
                index = read_index(paths, file, self.key_until)
                self._compared = _identity_of(file)
        # A remote shard may have been replaced since, together with its card.
        return None if index is not None and self._count not in (None, len(index)) else index

    def _scan(self) -> tuple[ShardIndex, Hashes]:
        """Scan the shard and write its index file."""
        with open_at_once(self.origin) as file:
            self._compared = _identity_of(file)
            index, key_hash = scan(file, self.key_until)
        time = 0 if self.is_remote else self._compared[1]
        return write_index(self._index_paths(), index, key_hash, time), key_hash

    def _expect_unchanged(self, index: ShardIndex) -> None:
        if self._edges not in (None, index.head_tail_hash):
            raise self._changed()
        if self._count not in (None, len(index)):
            raise BadShard(
                f"holds {len(index)} samples and the card says {self._count}: correct the card "
                "or fetch the shard again"
            )

    def _opened(self) -> ShardIndex:
        """Return the index during a run, in which a bad shard is a RuntimeError."""
        try:
            return self.index
        except BadShard as error:
            raise RuntimeError(f"shard {self.name} {error}") from None

    def _map(self, index: ShardIndex) -> mmap.mmap:
        maps, limit = (_remote_maps, _REMOTE_MAPS) if self.is_remote else (_maps, _MAPS)
        # Removed and inserted again, so the first is the least recently used. An evicted map is
        # not closed by hand: another thread may be reading it.
        mapped = maps.pop(self._map_key, None)
        maps[self._map_key] = mapped = self._mapped(index) if mapped is None else mapped
        if len(maps) > limit:
            maps.popitem(last=False)
        return mapped

    def _mapped(self, index: ShardIndex) -> mmap.mmap:
        try:
            with open_at_once(self.origin) as file:
                # Reading a map beyond the end of a shrunken file kills the process: check first.
                size = os.fstat(file.fileno()).st_size
                if size != index.size or not self._is_indexed(file, index):
                    raise self._changed()
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except BadShard as error:
            if self.is_remote:
                raise RuntimeError(f"shard {self.name} {error}") from None
            raise self._changed() from None

    def _is_indexed(self, file: BinaryIO, index: ShardIndex) -> bool:
        """Return whether a file is the indexed one; each file is compared once."""
        identity = _identity_of(file)
        if identity != self._compared and head_tail_hash(file, index.size) == index.head_tail_hash:
            self._compared = identity
        return identity == self._compared

    def _key(
        self, index: ShardIndex, data: mmap.mmap, number: int, first: tuple[str, int, int]
    ) -> str:
        """Read the key of a sample from the headers before its first member."""
        extension, offset, _ = first
        start = index.before(number)
        between = data[start : offset - BLOCK] if offset - start <= _NEAR else _PAX_PATH
        if _PAX_PATH not in between and _GNU_NAME not in between:
            header = plain_header(data[offset - BLOCK : offset])
            key, read_extension = (
                split(header.name, self.key_until) if header is not None else (b"", "")
            )
            if read_extension == extension:
                return key.decode("utf-8", "backslashreplace")
        with contextlib.suppress(BadShard):
            walk = members(lambda at, length: data[at : at + length], index.size, start)
            name = next((name for name, begins, _ in walk if begins == offset), b"")
            key, read_extension = split(name, self.key_until)
            if read_extension == extension:
                return key.decode("utf-8", "backslashreplace")
        raise self._changed()

    def _changed(self) -> RuntimeError:
        if self.is_remote:
            for path in self._index_paths():
                path.unlink(missing_ok=True)
        return RuntimeError(
            f"shard {self.name} changed or vanished since it was indexed: leave shards alone "
            "during a run, and start the same command again"
        )


def open_at_once(origin: ShardLocation) -> BinaryIO:
    """Open the file of a shard, fetched again if the cache evicted it before it was open.

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


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2] in IMAGES


def _preferred(
    listed: list[tuple[str, int, int]], uses: dict[str, StoredAs]
) -> list[tuple[str, int, int]]:
    """Return the members of a sample that hold its fields, of alternatives the first stated."""
    known = [member for member in listed if member[0] in uses]
    best: dict[str, int] = {}
    for extension, *_ in known:
        field, rank, _ = uses[extension]
        best[field] = min(rank, best.get(field, rank))
    return [each for each in known if uses[each[0]].rank == best[uses[each[0]].field]]


def _too_long(extension: str, length: int, limit: int) -> BadSample:
    return BadSample(f"its .{extension} has {length} bytes, more than {limit}")


def _identity_of(file: BinaryIO) -> tuple[int, int]:
    """Return inode and modification time in ns, which differ if the file was replaced."""
    status = os.fstat(file.fileno())
    return status.st_ino, status.st_mtime_ns
