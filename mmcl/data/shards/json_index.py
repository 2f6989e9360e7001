"""Index of a LLaVA-style JSON: offset of each record and length of its conversation."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic_write import write_atomic
from mmcl.data.errors import BadSample
from mmcl.data.protocols import IntArray
from mmcl.data.remote.location import sha256_of
from mmcl.data.shards.json_records import JsonRecords, find_records
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.shards.tar_index import edges_of

_VERSION = 2


@dataclass(frozen=True)
class JsonIndex:
    """Index of the n records of a JSON; 24 bytes for each.

    Attributes:
        records: offsets and lengths of the records.
        text_bytes: (n,) bytes of each record's conversation as a tar holds it, 0 for a bad record.
        sha256: hash of the JSON, in hex.
    """

    records: JsonRecords
    text_bytes: IntArray
    sha256: str


def open_json_index(path: Path, answer_field: str, cache: Path | None) -> JsonIndex:
    """Return the index of a JSON, from its index file or by a scan that writes this file.

    The file is ``<name>.index.npz``, in ``cache`` where the folder of the JSON is read-only. It is
    used if size, time and the hash of both ends of the JSON are unchanged, and it is whole;
    otherwise it is written again.

    Args:
        path: path of the JSON list or JSON lines.
        answer_field: field of the answer in records with ``text`` instead of ``conversations``.
        cache: cache folder for an index that cannot be next to the JSON; None = no cache.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON list and no JSON lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    stamp = _stamp(path, answer_field)
    hashed = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    index_paths = [path.with_name(f"{path.name}.index.npz")]
    if cache is not None:
        index_paths.append(cache / "indexes" / f"{hashed}-{path.name}.index.npz")
    for index_path in index_paths:
        found = _load(index_path, path, stamp) if index_path.is_file() else None
        if found is not None:
            return found
    made = _scan(path, answer_field)
    for index_path in index_paths:
        try:
            write_atomic(index_path, lambda temporary: _save(temporary, made, stamp))
            break
        except OSError:
            continue
    return made


def _scan(path: Path, answer_field: str) -> JsonIndex:
    records = find_records(path)
    lengths = np.zeros(len(records), dtype=np.int64)
    for number in range(len(records)):
        try:
            lengths[number] = len(read_sample(records.read(number), (), answer_field).data)
        except BadSample:
            continue
    return JsonIndex(records, lengths, sha256_of(path))


def _stamp(path: Path, answer_field: str) -> npt.NDArray[np.uint8]:
    """Return (32,) a digest that changes with the file or with the options of reading it."""
    status = path.stat()
    options = f"{_VERSION} {answer_field} {status.st_size} {status.st_mtime_ns} "
    with path.open("rb") as file:
        digest = edges_of(file, status.st_size, options.encode("utf-8", "backslashreplace"))
    return np.frombuffer(digest, np.uint8)


def _arrays(index: JsonIndex) -> dict[str, npt.NDArray[Any]]:
    return {
        "offset": index.records.offset,
        "length": index.records.length,
        "text_bytes": index.text_bytes,
        "sha256": np.frombuffer(bytes.fromhex(index.sha256), np.uint8),
        "size": np.array([index.records.size, index.records.time_ns], dtype=np.int64),
    }


def _checksum(arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _save(index_path: Path, index: JsonIndex, stamp: npt.NDArray[np.uint8]) -> None:
    arrays = _arrays(index)
    stored: dict[str, Any] = {**arrays, "stamp": stamp, "own": _checksum(arrays)}
    with index_path.open("wb") as file:
        np.savez(file, **stored)


def _load(index_path: Path, path: Path, stamp: npt.NDArray[np.uint8]) -> JsonIndex | None:
    """Read an index file, None if it is stale or not valid."""
    try:
        with zipfile.ZipFile(index_path) as zipped:
            # Uncompressed entries cannot expand to more than the file on disk.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist()):
                return None
        with np.load(index_path, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            names = ("offset", "length", "text_bytes", "sha256", "size")
            arrays = {name: stored[name] for name in names}
            if not np.array_equal(stored["own"], _checksum(arrays)):
                return None
    # An index file that cannot be read is written again, whatever the reason.
    except Exception:
        return None
    if not _is_consistent(arrays):
        return None
    size, time_ns = (int(value) for value in arrays["size"])
    records = JsonRecords(path, size, time_ns, arrays["offset"], arrays["length"])
    return JsonIndex(records, arrays["text_bytes"], arrays["sha256"].tobytes().hex())


def _is_consistent(arrays: dict[str, npt.NDArray[Any]]) -> bool:
    """Return whether every record is inside of the file."""
    int_arrays = [arrays[name] for name in ("offset", "length", "text_bytes", "size")]
    if any(array.dtype != np.int64 or array.ndim != 1 for array in int_arrays):
        return False
    offset, length, text_bytes, size = int_arrays
    return bool(
        len(size) == 2
        and 0 < len(offset) == len(length) == len(text_bytes)
        and arrays["sha256"].nbytes == 32
        and offset.min() >= 0
        and length.min() >= 0
        and text_bytes.min() >= 0
        and (offset <= size[0] - length).all()
    )
