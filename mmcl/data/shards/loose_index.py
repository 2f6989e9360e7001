"""The index of a LLaVA-style JSON: where each record is and how long its dialogue will be."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic import write_atomic
from mmcl.data.builders.llava_json import read_sample
from mmcl.data.faults import BadSample
from mmcl.data.shard import Numbers
from mmcl.data.shards.json_records import JsonRecords, find_records

_VERSION = 1
_EDGE = 1 << 16


@dataclass(frozen=True)
class LooseIndex:
    """What is known of the n records of a JSON; 24 bytes for each.

    Attributes:
        records: where they lie.
        said: (n,) bytes of each record's dialogue as a shard holds it, 0 where it has a fault.
        sha256: of the JSON, in hex.
    """

    records: JsonRecords
    said: Numbers
    sha256: str


def open_loose_index(path: Path, answer_field: str, cache: Path | None) -> LooseIndex:
    """Return the index of a JSON, from the file beside it or by a pass that writes this file.

    The file is ``<name>.index.npz``, in ``cache`` where the folder of the JSON is read-only. It is
    used if size, time and the hash of both ends of the JSON are as they were, and it is whole;
    otherwise it is made anew.

    Args:
        path: of the JSON list or JSON lines.
        answer_field: of records with ``text`` in place of ``conversations``.
        cache: folder for what cannot stand beside the JSON; None = keep it nowhere else.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no JSON list and no JSON lines.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    stamp = _stamp(path, answer_field)
    hashed = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    places = [path.with_name(f"{path.name}.index.npz")]
    if cache is not None:
        places.append(cache / "indexes" / f"{hashed}-{path.name}.index.npz")
    for place in places:
        found = _load(place, path, stamp) if place.is_file() else None
        if found is not None:
            return found
    made = _scan(path, answer_field)
    for place in places:
        try:
            write_atomic(place, lambda temporary: _save(temporary, made, stamp))
            break
        except OSError:
            continue
    return made


def _scan(path: Path, answer_field: str) -> LooseIndex:
    records = find_records(path)
    said = np.zeros(len(records), dtype=np.int64)
    for place in range(len(records)):
        try:
            said[place] = len(read_sample(records.read(place), (), answer_field).data)
        except BadSample:
            continue
    return LooseIndex(records, said, _sha256(path))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _stamp(path: Path, answer_field: str) -> npt.NDArray[np.uint8]:
    """Return (32,) a digest of all by which a changed file, or another reading of it, is seen."""
    status = path.stat()
    digest = hashlib.sha256(f"{_VERSION} {answer_field} ".encode("utf-8", "backslashreplace"))
    digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(_EDGE))
        file.seek(max(0, status.st_size - _EDGE))
        digest.update(file.read(_EDGE))
    return np.frombuffer(digest.digest(), np.uint8)


def _arrays(index: LooseIndex) -> dict[str, npt.NDArray[Any]]:
    return {
        "offset": index.records.offset,
        "length": index.records.length,
        "said": index.said,
        "sha256": np.frombuffer(bytes.fromhex(index.sha256), np.uint8),
        "size": np.array([index.records.size, index.records.time_ns], dtype=np.int64),
    }


def _own_hash(arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _save(place: Path, index: LooseIndex, stamp: npt.NDArray[np.uint8]) -> None:
    arrays = _arrays(index)
    stored: dict[str, Any] = {**arrays, "stamp": stamp, "own": _own_hash(arrays)}
    with place.open("wb") as file:
        np.savez(file, **stored)


def _load(place: Path, path: Path, stamp: npt.NDArray[np.uint8]) -> LooseIndex | None:
    """Read an index file, None if it is stale or anything about it is odd."""
    try:
        with zipfile.ZipFile(place) as zipped:
            # What is stored as it is cannot unfold to more than the file on disk.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in zipped.infolist()):
                return None
        with np.load(place, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            names = ("offset", "length", "said", "sha256", "size")
            arrays = {name: stored[name] for name in names}
            if not np.array_equal(stored["own"], _own_hash(arrays)):
                return None
    # A cache that cannot be read is made anew, whatever is the matter with it.
    except Exception:
        return None
    if not _makes_sense(arrays):
        return None
    size, time_ns = (int(value) for value in arrays["size"])
    records = JsonRecords(path, size, time_ns, arrays["offset"], arrays["length"])
    return LooseIndex(records, arrays["said"], arrays["sha256"].tobytes().hex())


def _makes_sense(arrays: dict[str, npt.NDArray[Any]]) -> bool:
    """Tell whether every record lies inside of the file."""
    numbers = [arrays[name] for name in ("offset", "length", "said", "size")]
    if any(array.dtype != np.int64 or array.ndim != 1 for array in numbers):
        return False
    offset, length, said, size = numbers
    return bool(
        len(size) == 2
        and 0 < len(offset) == len(length) == len(said)
        and arrays["sha256"].nbytes == 32
        and offset.min() >= 0
        and length.min() >= 0
        and said.min() >= 0
        and (offset <= size[0] - length).all()
    )
