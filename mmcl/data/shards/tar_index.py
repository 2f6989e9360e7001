"""Index of a tar shard: offsets and lengths of every sample's members, for random access.

Samples follow webdataset's convention: members of one key are adjacent, the key is everything up
to the first dot of the file name (folders included), the extension is the rest in lower case. Only
members of known harmless extensions are listed; others, pickles above all, are never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic_write import write_atomic
from mmcl.data.image_formats import IMAGE_EXTENSIONS
from mmcl.data.remote.location import ShardLocation
from mmcl.data.shards.tar import BLOCK, members, padded
from mmcl.data.stored_sample import BadShard, IntArray, hash_bytes

IMAGES = IMAGE_EXTENSIONS
Hashes = npt.NDArray[np.uint64]
UInts = npt.NDArray[np.uint32]

MAX_BYTES = BLOCK << 32
"""Largest shard whose blocks can be numbered with 32 bits."""
IN_LARGE = (1 << 32) - 1
"""Placeholder for the length of a member that is too long for 32 bits."""
MAX_EXTENSIONS = 256
_OTHERS = frozenset({"cls", "txt", "json"})
_EDGE = 1 << 16
_KEY_AND_EXTENSION = re.compile(rb"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")
_MAGIC = b"mmclidx2"
"""Magic number and version of the file format."""
_SUMS = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QqIIII32s")
_TYPES = ("<i8", "<u4", "<u4", "<u4", "|u1")
"""Data types of the arrays large, first, block, length and kind."""


def is_read(extension: str) -> bool:
    """Return whether members of this extension are ever read."""
    return extension in IMAGES or extension in _OTHERS or extension.endswith(".txt")


@dataclass(frozen=True)
class ShardIndex:
    """Index of one shard, with n samples and m members.

    Takes 4 n + 9 m bytes: 22 for a sample of image and text. Keys are stored in the shard itself,
    in the headers of the members, and their hashes in the index file.

    Attributes:
        size: bytes of the shard when it was scanned.
        head_tail_hash: sha256 of its first and last 64 KiB.
        extensions: extensions that occur in the shard.
        first: (n + 1,) index of each sample's first member in the next three arrays.
        block: (m,) start of a member's content, in blocks of 512 bytes.
        length: (m,) bytes of a member, 2**32 - 1 where ``large`` has them.
        kind: (m,) uint8 index of a member's extension in ``extensions``.
        large: (k, 2) int64 index and true length of the members of 4 GiB and more.
        key_hash: (n,) hashes of the keys where no file has them, 8 n bytes more; else None.
    """

    size: int
    head_tail_hash: bytes
    extensions: tuple[str, ...]
    first: UInts
    block: UInts
    length: UInts
    kind: npt.NDArray[np.uint8]
    large: IntArray
    key_hash: Hashes | None = None

    def __len__(self) -> int:
        """Return n, the number of samples."""
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.first, self.block, self.length, self.kind, self.large, self.key_hash)
        return sum(array.nbytes for array in arrays if array is not None)

    def members(self, index: int) -> Iterator[tuple[str, int, int]]:
        """Yield extension, offset and length of each member of a sample.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0 to {len(self) - 1}")
        for member in range(int(self.first[index]), int(self.first[index + 1])):
            extension = self.extensions[int(self.kind[member])]
            yield extension, int(self.block[member]) * BLOCK, self._length(member)

    def before(self, index: int) -> int:
        """Return the offset after the last listed member before a sample; its headers follow.

        Members that are not read may be in between.
        """
        member = int(self.first[index]) - 1
        return 0 if member < 0 else int(self.block[member]) * BLOCK + padded(self._length(member))

    def lengths(self, member: str) -> IntArray:
        """Return (n,) bytes of one member, such as "txt", of each sample, 0 where it has none."""
        lengths = np.zeros(len(self), dtype=np.int64)
        if member.lower() in self.extensions:
            members = np.flatnonzero(self.kind == self.extensions.index(member.lower()))
            owner = np.searchsorted(self.first, members, side="right") - 1
            lengths[owner] = self.true_lengths()[members]
        return lengths

    def true_lengths(self) -> IntArray:
        """Return (m,) bytes of every member."""
        lengths = self.length.astype(np.int64)
        lengths[self.large[:, 0]] = self.large[:, 1]
        return lengths

    def _length(self, member: int) -> int:
        length = int(self.length[member])
        if length < IN_LARGE:
            return length
        return int(self.large[np.searchsorted(self.large[:, 0], member), 1])


def scan(file: BinaryIO) -> tuple[ShardIndex, Hashes]:
    """Index a shard by walking over its headers.

    Args:
        file: a plain tar, open for reading; a buffer of a few KiB holds neighboring headers.

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
        key, extension = split(name)
        if extension:
            builder.add(key, extension, offset, length)
    return builder.index(size, head_tail_hash(file, size)), np.array(
        builder.key_hash, dtype=np.uint64
    )


def head_tail_hash(file: BinaryIO, size: int, prefix: bytes = b"") -> bytes:
    """Return the sha256 of ``prefix`` and of the first and the last 64 KiB of a file."""
    digest = hashlib.sha256(prefix)
    file.seek(0)
    digest.update(file.read(_EDGE))
    file.seek(max(0, size - _EDGE))
    digest.update(file.read(_EDGE))
    return digest.digest()


def split(name: bytes) -> tuple[bytes, str]:
    """Return key and extension of a member name; the extension is "" for those never read."""
    found = _KEY_AND_EXTENSION.match(name)
    if found is None or _META.match(name):
        return b"", ""
    extension = found[2].decode("ascii", "replace").lower()
    return found[1], extension if is_read(extension) else ""


class _IndexBuilder:
    """Index builder: the members of a shard as a scan finds them."""

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
            self.key_hash.append(hash_bytes(key))
            self.key, self.own = key, set()
        self.own.add(extension)
        self.offset.append(offset)
        self.length.append(length)
        kind = self.extensions.setdefault(extension, len(self.extensions))
        if kind >= MAX_EXTENSIONS:
            raise BadShard(
                f"has more than {MAX_EXTENSIONS} extensions of members, .{extension} for one: a "
                "key ends at the first dot of a file name, so write keys without dots"
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


def index_paths(origin: ShardLocation, cache: Path | None) -> list[Path]:
    """Return the possible paths of the index file of a shard, best first.

    Args:
        origin: location of the shard. The index of a local one is next to it, or in the cache
            where its folder is read-only; that of a remote one is always in the cache.
        cache: cache folder; None = no path, the index is not stored as a file.
    """
    if cache is None:
        return []
    path = Path(origin.url)
    identity = origin.url.encode() if origin.is_remote else os.fsencode(path.absolute())
    name = re.sub(r"[^\w.-]", "_", origin.url.split("?")[0].rpartition("/")[2])[-80:]
    cached = cache / "indexes" / f"{hashlib.sha256(identity).hexdigest()[:16]}-{name}.index"
    return [cached] if origin.is_remote else [path.with_name(f"{path.name}.index"), cached]


def write_index(
    paths: Sequence[Path], index: ShardIndex, key_hash: Hashes, time: int
) -> ShardIndex:
    """Write the index file of a shard to the first path that is writable.

    Args:
        paths: see ``index_paths``.
        index: result of a scan.
        key_hash: (n,) hashes of the keys.
        time: modification time of a local shard in ns, 0 for a remote one.

    Returns:
        the index; with the hashes in it if no path is writable: a full disk does not stop a run.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            write_atomic(path, _packed(index, key_hash, time))
            return index
    return replace(index, key_hash=key_hash)


def read_index(paths: Sequence[Path], file: BinaryIO | None) -> ShardIndex | None:
    """Return the index of a shard from its file, None if there is no valid one.

    Args:
        paths: see ``index_paths``.
        file: a local shard, whose size, time and edges must be as at the scan; None = a remote
            one, which is compared when it is fetched.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            if not path.is_file():
                continue
            with path.open("rb") as stored:
                header = _header(stored)
                if header is not None and _is_of(header, file):
                    index = _index(stored, header)
                    if index is not None and _is_consistent(index):
                        return index
    return None


def read_key_hashes(paths: Sequence[Path], index: ShardIndex) -> Hashes | None:
    """Return the (n,) hashes of the keys from the index file, None if it does not have them."""
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as stored:
            header = _header(stored)
            own = len(index), index.head_tail_hash
            if header is None or (header.samples, header.head_tail_hash) != own:
                continue
            stored.seek(-8 * header.samples, os.SEEK_END)
            data = stored.read(8 * header.samples)
            if zlib.crc32(data) == header.sum_of_hashes:
                return np.frombuffer(data, "<u8")
    return None


class _Header(NamedTuple):
    sum_of_index: int
    sum_of_hashes: int
    size: int
    time: int
    samples: int
    members: int
    large: int
    text_bytes: int
    head_tail_hash: bytes


def _packed(index: ShardIndex, key_hash: Hashes, time: int) -> bytes:
    text = json.dumps(index.extensions).encode()
    counts = (len(index), len(index.block), len(index.large), len(text))
    arrays = [index.large, index.first, index.block, index.length, index.kind]
    packed = [np.ascontiguousarray(a, t).tobytes() for a, t in zip(arrays, _TYPES, strict=True)]
    body = b"".join([_FIELDS.pack(index.size, time, *counts, index.head_tail_hash), *packed, text])
    hashes = key_hash.astype("<u8").tobytes()
    return _SUMS.pack(_MAGIC, zlib.crc32(body), zlib.crc32(hashes)) + body + hashes


def _header(stored: BinaryIO) -> _Header | None:
    """Read the header of an index file; None if its lengths do not match the size of the file."""
    data = stored.read(_SUMS.size + _FIELDS.size)
    if len(data) < _SUMS.size + _FIELDS.size:
        return None
    magic, *sums = _SUMS.unpack_from(data)
    header = _Header(*sums, *_FIELDS.unpack_from(data, _SUMS.size))
    body = sum(_lengths(header)) + header.text_bytes + 8 * header.samples
    is_whole = os.fstat(stored.fileno()).st_size == len(data) + body
    return header if magic == _MAGIC and is_whole else None


def _lengths(header: _Header) -> tuple[int, ...]:
    """Return the bytes of each array of an index file, in file order."""
    members = header.members
    return 16 * header.large, 4 * (header.samples + 1), 4 * members, 4 * members, members


def _is_of(header: _Header, file: BinaryIO | None) -> bool:
    """Return whether an index was made from this shard as it is now."""
    if file is None:
        return header.time == 0
    # Equal or not: a clock that was set back makes a newer file look older.
    status = os.fstat(file.fileno())
    if (header.size, header.time) != (status.st_size, status.st_mtime_ns):
        return False
    return header.head_tail_hash == head_tail_hash(file, header.size)


def _index(stored: BinaryIO, header: _Header) -> ShardIndex | None:
    stored.seek(_SUMS.size)
    body = stored.read(_FIELDS.size + sum(_lengths(header)) + header.text_bytes)
    if zlib.crc32(body) != header.sum_of_index:
        return None
    arrays, start = [], _FIELDS.size
    for length, kind in zip(_lengths(header), _TYPES, strict=True):
        arrays.append(np.frombuffer(body, kind, length // np.dtype(kind).itemsize, start))
        start += length
    large, first, block, lengths, kinds = arrays
    try:
        extensions = json.loads(body[start:])
    except (ValueError, RecursionError):
        return None
    if not isinstance(extensions, list) or not all(isinstance(one, str) for one in extensions):
        return None
    return ShardIndex(
        header.size, header.head_tail_hash, tuple(extensions), first, block, lengths, kinds,
        large.reshape(-1, 2),
    )  # fmt: skip


def _is_consistent(index: ShardIndex) -> bool:
    """Return whether every offset and number of an index is inside the shard."""
    first, large = index.first.astype(np.int64), index.large
    if first[0] != 0 or first[-1] != len(index.block) or (np.diff(first) <= 0).any():
        return False
    extensions = index.extensions
    if len(set(extensions)) != len(extensions) or not all(map(is_read, extensions)):
        return False
    if len(index.block) == 0:
        return len(large) == 0
    in_large = np.flatnonzero(index.length == IN_LARGE)
    if not np.array_equal(in_large, large[:, 0]) or (large[:, 1] < IN_LARGE).any():
        return False
    start = index.block.astype(np.int64) * BLOCK
    ends = start + index.true_lengths()
    # Between two members there is at least the header of the second.
    follows = (start[1:] >= ends[:-1] + BLOCK).all()
    return bool(
        index.kind.max() < len(extensions)
        and start[0] >= BLOCK
        and follows
        and ends.max() <= index.size
    )
