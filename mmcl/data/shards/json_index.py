"""Index of a LLaVA-style JSON list, or of JSON lines: its records are found in one pass.

A file of many gigabytes is never held as Python objects: the pass notes where records start and
end, by looking at quotes, brackets and commas of the list itself, and one is parsed at a time. The
index file stores this and the length of each conversation, 24 bytes a record.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mmcl.core.atomic_write import write_atomic
from mmcl.data.remote.location import sha256_of
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.shards.record_layouts import has_turns, keyed_record
from mmcl.data.shards.tar_index import head_tail_hash
from mmcl.data.stored_sample import BadSample, IntArray, one_line

MAX_RECORD_BYTES = 4 << 20
"""Longer records are bad samples."""
MAX_DEPTH = 64
"""Deepest nesting of lists and mappings in a record."""

_CHUNK = 8 << 20
_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_IS_STRUCTURE = _STEPS != 0
_IS_STRUCTURE[_COMMA] = True
_VERSION = 3
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class JsonRecords:
    """Offsets and lengths of the n records of a file; picklable.

    Attributes:
        path: path of the file.
        size: bytes of the file when it was scanned.
        time_ns: modification time of the file when it was scanned.
        offset: (n,) byte where each record starts; white space may surround it.
        length: (n,) bytes of each record.
    """

    path: Path
    size: int
    time_ns: int
    offset: IntArray
    length: IntArray

    def __len__(self) -> int:
        """Return n."""
        return len(self.offset)

    def part(self, indices: IntArray | slice) -> JsonRecords:
        """Return a subset of the records."""
        return replace(self, offset=self.offset[indices], length=self.length[indices])

    def read(self, index: int) -> Any:
        """Parse a record.

        Raises:
            BadSample: if it is too large, too deep, not UTF-8 or not JSON.
            RuntimeError: if the file changed since it was scanned.
        """
        offset, length = int(self.offset[index]), int(self.length[index])
        if length > MAX_RECORD_BYTES:
            raise BadSample(f"its record has {length} bytes, more than {MAX_RECORD_BYTES}")
        return parse(self._bytes(offset, length))

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) == (self.size, self.time_ns):
                    file.seek(offset)
                    return file.read(length)
        except OSError as error:
            raise RuntimeError(f"{self.path} cannot be read any more ({error.strerror})") from None
        raise RuntimeError(
            f"{self.path} changed since it was indexed: leave it alone during a run, and start "
            "the same command again"
        )


def parse(data: bytes) -> Any:
    """Parse the bytes of one record, which in a mapping of records follow its key.

    Raises:
        BadSample: if it is too deep, not UTF-8 or not JSON.
    """
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise BadSample(f"its record is nested more than {MAX_DEPTH} deep")
    try:
        text = data.decode("utf-8")
        if (keyed := _keyed(text)) is not None:
            return keyed_record(*keyed)
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its record is not JSON ({one_line(error)})") from None


def _keyed(text: str) -> tuple[str, Mapping[str, Any]] | None:
    """Return key and record of ``"key": {...}`` at the start of a text, None of other texts."""
    text = text.lstrip()
    if not text.startswith('"'):
        return None
    key, end = _DECODER.raw_decode(text)
    rest = text[end:].lstrip()
    if not rest.startswith(":"):
        return None
    record, _ = _DECODER.raw_decode(rest[1:].lstrip())
    return (key, record) if isinstance(record, Mapping) else None


def _are_keyed(file: BinaryIO, start: int) -> bool:
    """Return whether a mapping holds records: its first value is a question or a conversation."""
    file.seek(start + 1)
    try:
        found = _keyed(file.read(MAX_RECORD_BYTES).decode("utf-8", "ignore"))
    except (ValueError, RecursionError):
        return False
    return found is not None and ("question" in found[1] or has_turns(found[1]))


def find_records(path: Path) -> JsonRecords:
    """Find the records of a JSON list, or of a file with one JSON value in every line, in UTF-8.

    A mapping of ids to questions or conversations, as ScienceQA's ``problems.json``, is a list of
    its values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither of the two, is cut off, or holds no records.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        start, first = _start(file)
        if path.suffix == ".jsonl" or (first == b"{" and _is_lines(file, start)):
            offset, length = _lines(file, start)
        elif first == b"[" or (first == b"{" and _are_keyed(file, start)):
            offset, length = _elements(path, file, start)
        else:
            stop = status.st_size if first == b"{" else start
            offset, length = np.array([start]), np.array([stop - start])
        if len(offset) == 1 and not _has_text(file, int(offset[0]), int(length[0])):
            offset = length = offset[:0]
    if not len(offset):
        reason = "" if first in b"[{" else f" (it starts with byte {first[0]:#04x})"
        raise ValueError(
            f"{path} holds no samples{reason}: expected a JSON list of them, or one in every "
            "line, saved as UTF-8"
        )
    return JsonRecords(path, status.st_size, status.st_mtime_ns, offset, length)


def _start(file: BinaryIO) -> tuple[int, bytes]:
    """Return offset and value of the first byte that is not white space; b"" if there is none."""
    mark = _BYTE_ORDER_MARK
    start = len(mark) if file.read(len(mark)) == mark else 0
    file.seek(start)
    while chunk := file.read(1 << 16):
        rest = chunk.lstrip(_SPACE)
        if rest:
            return start + len(chunk) - len(rest), rest[:1]
        start += len(chunk)
    return start, b""


def _is_lines(file: BinaryIO, start: int) -> bool:
    """Return whether a file that starts with ``{`` holds more than this one value."""
    file.seek(start)
    line = file.readline(MAX_RECORD_BYTES)
    return line.rstrip().endswith(b"}") and bool(file.read(1 << 16).strip())


def _lines(file: BinaryIO, start: int) -> tuple[IntArray, IntArray]:
    """Return offset and length of all lines that are not blank."""
    offset, length = array("q"), array("q")
    file.seek(start)
    line_start, has_text = start, False
    while line := file.readline(MAX_RECORD_BYTES):
        start += len(line)
        has_text = has_text or not line.isspace()
        if line.endswith(b"\n") or not file.peek(1):  # type: ignore[attr-defined]
            if has_text:
                offset.append(line_start)
                length.append(start - line_start)
            line_start, has_text = start, False
    return np.array(offset, dtype=np.int64), np.array(length, dtype=np.int64)


def _elements(path: Path, file: BinaryIO, start: int) -> tuple[IntArray, IntArray]:
    """Return offset and length of the elements of a list: what its brackets and commas separate."""
    file.seek(start)
    bounds = [np.array([start], dtype=np.int64)]
    depth, in_string, done = 0, False, start
    while len(chunk := _chunk(path, file)):
        structure, ends_in_string = _outside_of_strings(chunk, in_string)
        depths = depth + np.cumsum(_STEPS[chunk[structure]], dtype=np.int64)
        ends = np.flatnonzero(depths == 0)
        if len(ends):
            end = int(structure[ends[0]])
            own = structure[: ends[0]][depths[: ends[0]] == 1]
            bounds.append(done + own[chunk[own] == _COMMA])
            bounds.append(np.array([done + end]))
            _expect_only_space(path, file, done + end + 1)
            bound = np.concatenate(bounds)
            return bound[:-1] + 1, np.diff(bound) - 1
        own = structure[(depths == 1) & (chunk[structure] == _COMMA)]
        bounds.append(done + own)
        depth, in_string = int(depths[-1]) if len(depths) else depth, ends_in_string
        done += len(chunk)
    raise ValueError(
        f"{path} is not JSON, it ends at byte {done} in the middle of its list: fetch or write it "
        "again"
    )


def _chunk(path: Path, file: BinaryIO) -> npt.NDArray[np.uint8]:
    """Read a chunk that does not end between a backslash and the character that it escapes."""
    chunk = file.read(_CHUNK)
    while chunk.endswith(b"\\") and (more := file.read(1 << 16)):
        chunk += more
        if len(chunk) > 4 * MAX_RECORD_BYTES + _CHUNK:
            raise ValueError(f"{path} is not JSON, it holds megabytes of backslashes")
    return np.frombuffer(chunk, np.uint8)


def _outside_of_strings(chunk: npt.NDArray[np.uint8], in_string: bool) -> tuple[IntArray, bool]:
    """Find brackets and commas that are not inside of a string, and whether the chunk ends in one.

    ``chunk`` are (n,) bytes of the file that start in no escape, ``in_string`` or not.
    """
    quotes = np.flatnonzero(chunk == _QUOTE)
    slashes = np.flatnonzero(chunk == _BACKSLASH)
    if len(slashes):
        # A quote is part of the string if an odd number of backslashes precedes it.
        runs = slashes[np.flatnonzero(np.diff(slashes, prepend=-2) > 1)]
        after = (quotes > 0) & (chunk[quotes - 1] == _BACKSLASH)
        run = runs[np.searchsorted(runs, quotes[after]) - 1]
        escaped = np.zeros(len(quotes), dtype=bool)
        escaped[after] = (quotes[after] - run) % 2 == 1
        quotes = quotes[~escaped]
    found = np.flatnonzero(_IS_STRUCTURE[chunk])
    before = np.searchsorted(quotes, found)
    return found[(before + in_string) % 2 == 0], bool((len(quotes) + in_string) % 2)


def _expect_only_space(path: Path, file: BinaryIO, end: int) -> None:
    file.seek(end)
    while chunk := file.read(1 << 20):
        if chunk.strip(_SPACE):
            raise ValueError(
                f"{path} is not JSON, it continues after the end of its list at byte {end}"
            )


def _has_text(file: BinaryIO, offset: int, length: int) -> bool:
    file.seek(offset)
    return length > 1 << 16 or bool(file.read(length).strip(_SPACE + _BYTE_ORDER_MARK))


def _depth(data: bytes) -> int:
    chunk = np.frombuffer(data, np.uint8)
    structure, _ = _outside_of_strings(chunk, False)
    return int(np.cumsum(_STEPS[chunk[structure]], dtype=np.int64).max(initial=0))


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
        digest = head_tail_hash(file, status.st_size, options.encode("utf-8", "backslashreplace"))
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
