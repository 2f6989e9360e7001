"""The index of a shard: where every sample's members lie, so that any of them is read at once.

Samples follow webdataset's convention: members of one key stand together, the key is everything up
to the first dot of the file name (folders included), the extension is the rest in lower case. Only
members of known harmless extensions are listed; others, pickles above all, are never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic import write_atomic
from mmcl.data.shard import Numbers
from mmcl.data.tar import members

IMAGES = ("jpg", "jpeg", "png", "webp")
_OTHERS = frozenset({"cls", "txt", "json"})
_VERSION = 1
_EDGE = 1 << 16
_KEY_AND_EXTENSION = re.compile(rb"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(rb"__[^/]*__($|/)")
_DTYPES = {
    "stamp": np.int64, "edges": np.uint8, "first": np.int64, "offset": np.int64,
    "length": np.int64, "kind": np.int32, "key_ends": np.int64, "keys": np.uint8,
    "key_hash": np.uint64, "extensions": np.uint8,
}  # fmt: skip


def is_read(extension: str) -> bool:
    """Tell whether members of this extension are ever looked at."""
    return extension in IMAGES or extension in _OTHERS or extension.endswith(".txt")


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie; n samples of m members in all.

    Attributes:
        path: of the shard.
        name: of the shard as the card has it.
        size: bytes of the shard when it was scanned.
        first: (n + 1,) place of each sample's first member in the next three.
        offset: (m,) byte where a member's content starts.
        length: (m,) its bytes.
        kind: (m,) int32 place of its extension in ``extensions``.
        extensions: that occur in the shard.
        key_ends: (n,) where each key ends in ``keys``.
        keys: (bytes of all keys,) uint8, one after the other.
        key_hash: (n,) uint64, to find repeated keys.
    """

    path: Path
    name: str
    size: int
    first: Numbers
    offset: Numbers
    length: Numbers
    kind: npt.NDArray[np.int32]
    extensions: tuple[str, ...]
    key_ends: Numbers
    keys: npt.NDArray[np.uint8]
    key_hash: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        """Return n, the number of samples."""
        return len(self.key_ends)

    def key(self, place: int) -> str:
        """Return the key of a sample; bytes that are not UTF-8 are written in hex."""
        start = int(self.key_ends[place - 1]) if place else 0
        raw: bytes = self.keys[start : int(self.key_ends[place])].tobytes()
        return raw.decode("utf-8", "backslashreplace")

    def members(self, place: int) -> Iterator[tuple[str, int, int]]:
        """Give extension, offset and length of each member of a sample."""
        for number in range(int(self.first[place]), int(self.first[place + 1])):
            extension = self.extensions[int(self.kind[number])]
            yield extension, int(self.offset[number]), int(self.length[number])


def scan(path: Path, name: str) -> ShardIndex:
    """Index a shard by walking over its headers.

    Args:
        path: of a plain tar.
        name: for messages, as the card has it.

    Raises:
        BadShard: if it is not a whole tar.
        OSError: if it cannot be read.
    """
    first, offset, length, key_ends = (array("q") for _ in range(4))
    kind, key_hash, keys = array("i"), array("Q"), bytearray()
    extensions: dict[str, int] = {}
    own: set[str] = set()
    last: bytes | None = None
    size = path.stat().st_size
    with path.open("rb") as file:
        for member in members(file, size):
            key, extension = _split(member.name)
            if not is_read(extension):
                continue
            # A member named twice starts another sample of the same key, which is reported.
            if key != last or extension in own:
                first.append(len(offset))
                keys += key
                key_ends.append(len(keys))
                key_hash.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
                last, own = key, set()
            own.add(extension)
            offset.append(member.offset)
            length.append(member.length)
            kind.append(extensions.setdefault(extension, len(extensions)))
    first.append(len(offset))
    return ShardIndex(
        path, name, size, np.array(first), np.array(offset, dtype=np.int64),
        np.array(length, dtype=np.int64), np.array(kind, dtype=np.int32), tuple(extensions),
        np.array(key_ends, dtype=np.int64), np.frombuffer(bytes(keys), np.uint8),
        np.array(key_hash, dtype=np.uint64),
    )  # fmt: skip


def open_index(path: Path, name: str, cache: Path) -> ShardIndex:
    """Return the index of a shard, from the file beside it or by a scan that writes this file.

    The file is ``<shard>.index.npz``, in ``cache`` where the shard's folder is read-only. It is
    used if size, time and the hash of both ends of the shard are as they were at the scan and
    its content makes sense; otherwise it is made anew.

    Args:
        path: of the shard.
        name: for messages, as the card has it.
        cache: folder for what cannot stand beside the shard.

    Raises:
        BadShard: if the shard is not a whole tar.
        OSError: if it cannot be read.
    """
    stamp, edges = _stamp(path), _edges(path)
    hashed = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    places = [
        path.with_name(f"{path.name}.index.npz"),
        cache / "indexes" / f"{hashed}-{path.name}.index.npz",
    ]
    for place in places:
        found = _load(place, path, name, stamp, edges) if place.is_file() else None
        if found is not None:
            return found
    made = scan(path, name)
    for place in places:
        try:
            write_atomic(place, lambda temporary: _save(temporary, made, stamp, edges))
            break
        except OSError:
            continue
    return made


def _split(name: bytes) -> tuple[bytes, str]:
    """Return key and extension, the extension empty for names that belong to no sample."""
    found = _KEY_AND_EXTENSION.match(name)
    if found is None or _META.match(name):
        return b"", ""
    return found[1], found[2].decode("ascii", "replace").lower()


def _stamp(path: Path) -> Numbers:
    status = path.stat()
    return np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def _edges(path: Path) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, path.stat().st_size - _EDGE))
        digest.update(file.read(_EDGE))
    return np.frombuffer(digest.digest(), np.uint8)


def _save(place: Path, index: ShardIndex, stamp: Numbers, edges: npt.NDArray[np.uint8]) -> None:
    extensions = np.frombuffer(json.dumps(index.extensions).encode(), np.uint8)
    own = {name: getattr(index, name) for name in _DTYPES if hasattr(index, name)}
    with place.open("wb") as file:
        np.savez(file, **{**own, "stamp": stamp, "edges": edges, "extensions": extensions})


def _load(
    place: Path, path: Path, name: str, stamp: Numbers, edges: npt.NDArray[np.uint8]
) -> ShardIndex | None:
    """Read an index file, None if it is stale or anything about it is odd."""
    try:
        with zipfile.ZipFile(place) as zipped:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist()):
                return None
        with np.load(place, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            arrays = {key: stored[key] for key in _DTYPES}
        if not np.array_equal(arrays["edges"], edges) or not _makes_sense(arrays, int(stamp[1])):
            return None
        extensions = json.loads(arrays.pop("extensions").tobytes())
        kinds = arrays["kind"]
        if not isinstance(extensions, list) or not all(map(is_read, extensions)):
            return None
        if len(kinds) and not 0 <= kinds.min() <= kinds.max() < len(extensions):
            return None
    # A cache that cannot be read is made anew, whatever is the matter with it.
    except Exception:
        return None
    rest = {key: arrays[key] for key in arrays if key not in ("stamp", "edges")}
    return ShardIndex(path, name, int(stamp[1]), extensions=tuple(extensions), **rest)


def _makes_sense(arrays: dict[str, npt.NDArray[np.generic]], size: int) -> bool:
    """Tell whether every number of an index file points at something inside the shard."""
    if any(arrays[key].dtype != dtype or arrays[key].ndim != 1 for key, dtype in _DTYPES.items()):
        return False
    names = ("first", "offset", "length", "key_ends")
    first, offset, length, ends = (arrays[name].astype(np.int64, copy=False) for name in names)
    samples = len(ends)
    if not len(first) == samples + 1 == len(arrays["key_hash"]) + 1:
        return False
    if not len(offset) == len(length) == len(arrays["kind"]) == first[-1] or first[0] != 0:
        return False
    if samples == 0:
        return True
    return bool(
        (np.diff(first) > 0).all()
        and (np.diff(ends) > 0).all()
        and ends[0] > 0
        and ends[-1] == len(arrays["keys"])
        and offset.min() >= 0
        and length.min() >= 0
        and (offset <= size - length).all()
    )
