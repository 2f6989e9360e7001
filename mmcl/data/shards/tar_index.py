"""Index of a tar shard: offsets and lengths of every sample's members, and the index file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card import KeyUntil
from mmcl.data.image_formats import IMAGE_EXTENSIONS
from mmcl.data.remote.location import ShardLocation
from mmcl.data.shards.tar import BLOCK, padded
from mmcl.data.stored_sample import IntArray

IMAGES = IMAGE_EXTENSIONS
Hashes = npt.NDArray[np.uint64]
UInts = npt.NDArray[np.uint32]

IN_LARGE = (1 << 32) - 1
"""Placeholder for the length of a member that is too long for 32 bits."""
_NEVER_READ = frozenset({
    "pyd", "pickle", "pkl", "pk", "dill", "joblib", "pth", "pt", "ckpt", "bin", "ten", "tenbin",
    "npy", "npz", "mp", "msgpack", "gz", "bz2", "xz", "zst", "zip", "tar", "tgz", "csv", "tsv",
    "parquet", "md", "rst", "yaml", "yml", "toml", "log", "py", "sh",
})  # fmt: skip
"""Pickles, arrays, archives, and files about a shard that are no part of a sample."""
_EDGE = 1 << 16
_MAGIC = b"mmclidx3"
"""Magic number and version of the file format."""
_SUMS = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QqIIII32s")
_TYPES = ("<i8", "<u4", "<u4", "<u4", "|u1")
"""Data types of the arrays large, first, block, length and kind."""


def is_read(extension: str) -> bool:
    """Return whether a card may name members of this extension; pickles are never read."""
    return bool(extension) and extension.rpartition(".")[2] not in _NEVER_READ


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
        unread: extension -> number of members that are never read.
        key_until: where the keys end.
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
    unread: Mapping[str, int] = field(default_factory=dict)
    key_until: KeyUntil = "first_dot"
    key_hash: Hashes | None = None

    def __len__(self) -> int:
        """Return n, the number of samples."""
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.first, self.block, self.length, self.kind, self.large, self.key_hash)
        return sum(array.nbytes for array in arrays if array is not None)

    def members(self, index: int) -> list[tuple[str, int, int]]:
        """Return extension, offset and length of each member of a sample.

        Raises:
            IndexError: if there is no such sample.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside 0 to {len(self) - 1}")
        start, end = int(self.first[index]), int(self.first[index + 1])
        extensions, kind, block, length = self.extensions, self.kind, self.block, self.length
        found = [
            (extensions[kind[member]], int(block[member]) * BLOCK, int(length[member]))
            for member in range(start, end)
        ]
        if len(self.large):
            return [
                (*each[:2], self._length(member)) for member, each in enumerate(found, start=start)
            ]
        return found

    @cached_property
    def is_sorted(self) -> bool:
        """Whether the members of every sample are adjacent, as webdataset's own reader needs."""
        return bool((self.block[1:] > self.block[:-1]).all())

    def before(self, index: int) -> int:
        """Return the offset after the last listed member before a sample; its headers follow.

        Members that are not read may be in between.
        """
        member = int(self.first[index]) - 1
        if not self.is_sorted:
            own = self.block[int(self.first[index])]
            earlier = self.block < own
            member = int(np.where(earlier, self.block, 0).argmax()) if earlier.any() else -1
        return 0 if member < 0 else int(self.block[member]) * BLOCK + padded(self._length(member))

    def counts(self) -> dict[str, int]:
        """Return extension -> number of members, also of those that are never read."""
        listed = np.bincount(self.kind, minlength=len(self.extensions)).tolist()
        return {**dict(zip(self.extensions, listed, strict=True)), **self.unread}

    def several(self, members: Collection[str], least: int = 2) -> IntArray:
        """Return the indices of the samples that have at least ``least`` of these members."""
        kinds = [kind for kind, name in enumerate(self.extensions) if name in members]
        if len(kinds) < least or len(self) == 0:
            return np.zeros(0, dtype=np.int64)
        counts = np.add.reduceat(np.isin(self.kind, kinds).astype(np.int64), self.first[:-1])
        return np.flatnonzero(counts >= least)

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


def head_tail_hash(file: BinaryIO, size: int, prefix: bytes = b"") -> bytes:
    """Return the sha256 of ``prefix`` and of the first and the last 64 KiB of a file."""
    digest = hashlib.sha256(prefix)
    file.seek(0)
    digest.update(file.read(_EDGE))
    file.seek(max(0, size - _EDGE))
    digest.update(file.read(_EDGE))
    return digest.digest()


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


def read_index(
    paths: Sequence[Path], file: BinaryIO | None, key_until: KeyUntil = "first_dot"
) -> ShardIndex | None:
    """Return the index of a shard from its file, None if there is no valid one.

    Args:
        paths: see ``index_paths``.
        file: a local shard, whose size, time and edges must be as at the scan; None = a remote
            one, which is compared when it is fetched.
        key_until: where the keys end, as at the scan.
    """
    for path in paths:
        with contextlib.suppress(OSError):
            if not path.is_file():
                continue
            with path.open("rb") as stored:
                header = _header(stored)
                if header is not None and _is_of(header, file):
                    index = _index(stored, header)
                    is_same = index is not None and index.key_until == key_until
                    if index is not None and is_same and _is_consistent(index):
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
    text = json.dumps([index.extensions, index.unread, index.key_until]).encode()
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
        extensions, unread, key_until = json.loads(body[start:])
        counts = {name: int(count) for name, count in unread.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(extensions, list) or not all(isinstance(one, str) for one in extensions):
        return None
    return ShardIndex(
        header.size, header.head_tail_hash, tuple(extensions), first, block, lengths, kinds,
        large.reshape(-1, 2), counts, key_until,
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
    # Samples follow each other by their first members, and the members of a sample rise.
    rises = np.diff(index.block.astype(np.int64)) > 0
    rises[first[1:-1] - 1] = True
    if not rises.all() or (np.diff(index.block[first[:-1]].astype(np.int64)) <= 0).any():
        return False
    order = slice(None) if index.is_sorted else np.argsort(index.block)
    start = (index.block.astype(np.int64) * BLOCK)[order]
    ends = start + index.true_lengths()[order]
    # Between two members there is at least the header of the second.
    follows = (start[1:] >= ends[:-1] + BLOCK).all()
    return bool(
        index.kind.max() < len(extensions)
        and start[0] >= BLOCK
        and follows
        and ends.max() <= index.size
    )
