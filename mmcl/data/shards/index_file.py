"""The index of a shard as a file, so that a shard is scanned once: written, checked, found again.

A file is a header, the arrays of ``ShardIndex`` one after the other, the extensions as JSON, and
the hashes of the keys, which are read by themselves when they are asked for. Little-endian. All of
it is guarded by checksums and by what it must hold to make sense; a file that is not as it was
written counts as none. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mmcl.core.atomic import write_atomic
from mmcl.data.shard import Origin
from mmcl.data.shards.index import IN_LARGE, Hashes, ShardIndex, edges_of, is_read
from mmcl.data.shards.tar import BLOCK

_MAGIC = b"mmclidx2"
"""What it is, and the version of its format."""
_SUMS = struct.Struct("<8sII")
_FIELDS = struct.Struct("<QqIIII32s")
_TYPES = ("<i8", "<u4", "<u4", "<u4", "|u1")
"""Of the arrays large, first, block, length and kind."""


def index_places(origin: Origin, cache: Path | None) -> list[Path]:
    """Return where the index of a shard may lie, best first.

    Args:
        origin: of the shard. Beside a local one is its index, or in the cache where its folder is
            read-only; always there for a remote one.
        cache: None = nowhere, no index is kept as a file.
    """
    if cache is None:
        return []
    path = Path(origin.url)
    marked = origin.url.encode() if origin.is_remote else os.fsencode(path.absolute())
    last = re.sub(r"[^\w.-]", "_", origin.url.split("?")[0].rpartition("/")[2])[-80:]
    cached = cache / "indexes" / f"{hashlib.sha256(marked).hexdigest()[:16]}-{last}.index"
    return [cached] if origin.is_remote else [path.with_name(f"{path.name}.index"), cached]


def write_index(
    places: Sequence[Path], index: ShardIndex, key_hash: Hashes, time: int
) -> ShardIndex:
    """Write the index of a shard at the first place that takes it.

    Args:
        places: see ``index_places``.
        index: of a scan.
        key_hash: (n,) hashes of the keys.
        time: of the last change of a local shard in ns, 0 for a remote one.

    Returns:
        the index; with the hashes if no place took it: a full disk does not stop a run.
    """
    for place in places:
        with contextlib.suppress(OSError):
            write_atomic(place, _packed(index, key_hash, time))
            return index
    return replace(index, key_hash=key_hash)


def read_index(places: Sequence[Path], file: BinaryIO | None) -> ShardIndex | None:
    """Return the index of a shard as it was written, None if there is none to be trusted.

    Args:
        places: see ``index_places``.
        file: a local shard, whose size, time and edges must be as at the scan; None = a remote
            one, which is compared when it is fetched.
    """
    for place in places:
        with contextlib.suppress(OSError):
            found = _read(place, file)
            if found is not None:
                return found
    return None


def read_key_hashes(places: Sequence[Path], index: ShardIndex) -> Hashes | None:
    """Return the (n,) hashes of the keys from the file of an index, None if they are not there."""
    for place in places:
        with contextlib.suppress(OSError), place.open("rb") as stored:
            header = _header(stored)
            if header is None or (header.samples, header.edges) != (len(index), index.edges):
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
    edges: bytes


def _packed(index: ShardIndex, key_hash: Hashes, time: int) -> bytes:
    text = json.dumps(index.extensions).encode()
    counts = (len(index), len(index.block), len(index.large), len(text))
    arrays = [index.large, index.first, index.block, index.length, index.kind]
    own = [np.ascontiguousarray(a, t).tobytes() for a, t in zip(arrays, _TYPES, strict=True)]
    guarded = b"".join([_FIELDS.pack(index.size, time, *counts, index.edges), *own, text])
    hashes = key_hash.astype("<u8").tobytes()
    return _SUMS.pack(_MAGIC, zlib.crc32(guarded), zlib.crc32(hashes)) + guarded + hashes


def _read(place: Path, file: BinaryIO | None) -> ShardIndex | None:
    if not place.is_file():
        return None
    with place.open("rb") as stored:
        header = _header(stored)
        if header is None or not _is_of(header, file):
            return None
        index = _index(stored, header)
    return index if index is not None and _makes_sense(index) else None


def _header(stored: BinaryIO) -> _Header | None:
    """Read the header of an index file; None if the file is not as long as it says."""
    data = stored.read(_SUMS.size + _FIELDS.size)
    if len(data) < _SUMS.size + _FIELDS.size:
        return None
    magic, *sums = _SUMS.unpack_from(data)
    header = _Header(*sums, *_FIELDS.unpack_from(data, _SUMS.size))
    body = sum(_lengths(header)) + header.text_bytes + 8 * header.samples
    is_whole = os.fstat(stored.fileno()).st_size == len(data) + body
    return header if magic == _MAGIC and is_whole else None


def _lengths(header: _Header) -> tuple[int, ...]:
    """Return the bytes of the arrays in an index file, in their order there."""
    members = header.members
    return 16 * header.large, 4 * (header.samples + 1), 4 * members, 4 * members, members


def _is_of(header: _Header, file: BinaryIO | None) -> bool:
    """Tell whether an index was made from this shard as it is now."""
    if file is None:
        return header.time == 0
    # Equal or not: a clock that was set back makes a newer file look older.
    status = os.fstat(file.fileno())
    if (header.size, header.time) != (status.st_size, status.st_mtime_ns):
        return False
    return header.edges == edges_of(file, header.size)


def _index(stored: BinaryIO, header: _Header) -> ShardIndex | None:
    stored.seek(_SUMS.size)
    guarded = stored.read(_FIELDS.size + sum(_lengths(header)) + header.text_bytes)
    if zlib.crc32(guarded) != header.sum_of_index:
        return None
    arrays, start = [], _FIELDS.size
    for length, kind in zip(_lengths(header), _TYPES, strict=True):
        arrays.append(np.frombuffer(guarded, kind, length // np.dtype(kind).itemsize, start))
        start += length
    large, first, block, lengths, kinds = arrays
    try:
        extensions = json.loads(guarded[start:])
    except (ValueError, RecursionError):
        return None
    if not isinstance(extensions, list) or not all(isinstance(one, str) for one in extensions):
        return None
    own = tuple(extensions)
    return ShardIndex(
        header.size, header.edges, own, first, block, lengths, kinds, large.reshape(-1, 2)
    )


def _makes_sense(index: ShardIndex) -> bool:
    """Tell whether every number of an index points at something inside the shard."""
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
