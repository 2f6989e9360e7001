"""Records of a JSON list, or of JSON lines, found in one pass and parsed one at a time.

A file of many gigabytes is never held as Python objects: the pass only notes where records start
and end, 16 bytes for each, by looking at quotes, brackets and commas of the list itself.
"""

from __future__ import annotations

import json
import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mmcl.data.errors import BadSample
from mmcl.data.protocols import IntArray

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
    """Parse the bytes of one record.

    Raises:
        BadSample: if it is too deep, not UTF-8 or not JSON.
    """
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise BadSample(f"its record is nested more than {MAX_DEPTH} deep")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"its record is not JSON ({' '.join(str(error).split())[:200]})") from None


def find_records(path: Path) -> JsonRecords:
    """Find the records of a JSON list, or of a file with one JSON value in every line.

    Args:
        path: UTF-8; a byte order mark is skipped.

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
        elif first == b"[":
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
    """Find brackets and commas that are not inside of a string.

    Args:
        chunk: (n,) bytes of the file, not in the middle of an escape.
        in_string: whether the chunk starts inside of a string.

    Returns:
        their indices in the chunk, and whether it ends inside of a string.
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
