"""Input from tables: their columns and rows, and csv and tsv, which are read line by line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mmcl.data.convert.record import (
    SPLITS,
    Chunk,
    InputData,
    InvalidRecord,
    Record,
    task_name,
)
from mmcl.data.shards.image_folder import (
    MAX_IMAGE_FILE_BYTES,
    ImageFolder,
    extension_of,
    open_image_folder,
)
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, IntArray

_NAMES = {
    "path": ("path", "image", "img", "file_name", "filename", "file"),
    "text": ("text", "caption"),
    "label": ("label", "class"),
    "question": ("question",),
    "answer": ("answer",),
    "task": ("task",),
    "split": ("split",),
}
"""Field -> column names that are accepted for it, as in tables on the hub."""
_NEEDS = {
    "captioning": ("path", "text"),
    "retrieval": ("path", "text"),
    "classification": ("path", "label"),
    "instruction": ("question", "answer"),
}
_CHUNK_RECORDS = 1000
_MAX_LINE = 4 << 20
_MARK = b"\xef\xbb\xbf"
_LAYOUTS = "path,text (captions), path,label (classes) or path,question,answer (questions)"


@dataclass(frozen=True)
class Columns:
    """Columns of a table that are used.

    Attributes:
        task_type: of the task.
        names: field -> the column's name in this table.
    """

    task_type: str
    names: Mapping[str, str]


def find_columns(
    found: Sequence[str], task_type: str | None, where: str, task_column: str | None = None
) -> Columns:
    """Choose the columns of a table by their names, ignoring case.

    Args:
        found: names of the table's columns.
        task_type: "captioning", "retrieval", "classification", "instruction"; None takes what the
            columns allow.
        where: path for messages.
        task_column: column that states the task; None = ``task``, if there is one.

    Raises:
        ValueError: if columns are missing, or more than one task type is possible.
    """
    plain = {name.strip().lower(): name for name in reversed(found)}
    names = {
        use: plain[next(name for name in accepted if name in plain)]
        for use, accepted in _NAMES.items()
        if any(name in plain for name in accepted)
    }
    listed = ", ".join(name[:40] if name.isprintable() else repr(name[:40]) for name in found[:20])
    if task_column is not None:
        if task_column.strip().lower() not in plain:
            raise ValueError(
                f"{where} has no column {task_column!r} for --task_column, it has {listed}"
            )
        names["task"] = plain[task_column.strip().lower()]
    if task_type is None:
        possible = [
            name
            for name, needs in _NEEDS.items()
            if name != "retrieval" and all(need in names for need in needs)
        ]
        if not possible:
            raise ValueError(f"{where} has the columns {listed}: expected {_LAYOUTS}")
        if len(possible) > 1:
            raise ValueError(
                f"{where} has the columns {listed}, which could be {' or '.join(possible)}: "
                "choose one with --task_type"
            )
        task_type = possible[0]
    missing = [need for need in _NEEDS[task_type] if need not in names]
    if missing:
        raise ValueError(
            f"{where} lacks the column {' and '.join(missing)} that "
            f"--task_type {task_type} needs, it has {listed}: expected {_LAYOUTS}"
        )
    used = (*_NEEDS[task_type], "path", "task", "split")
    return Columns(task_type, {use: name for use, name in names.items() if use in used})


def record_of(row: Mapping[str, Any], columns: Columns, images: ImageFolder, where: str) -> Record:
    """Convert a row of a table, field -> value, to a record.

    A value is a text, a number or None; the image may also be bytes, or a mapping with ``bytes``
    and ``path`` as in data sets on the hub. ``where`` is the line or row, for messages.

    Raises:
        BadSample: if a value or the image is missing.
    """
    members: dict[str, bytes] = {}
    task_type = columns.task_type
    image = row.get("path")
    if task_type != "instruction" or image not in (None, ""):
        extension, data = _image(image, images)
        members[extension] = data
    if task_type == "instruction":
        texts = {"text": _text(row, "question"), "answer": _text(row, "answer")}
        # The path only tells that there is an image, whose bytes are in the members.
        members["json"] = read_sample({**texts, "image": "x" if members else None}).data
    elif task_type != "classification":
        members["txt"] = _text(row, "text").encode()
    task = task_name(row["task"], columns.names["task"], where) if "task" in row else ""
    split = _text(row, "split").lower() if "split" in row else ""
    if split not in SPLITS:
        raise BadSample(f"its split is {split[:40]!r}, expected train or test")
    label = _text(row, "label") if task_type == "classification" else ""
    return Record("", members, task, label, split)


def _image(stated: Any, images: ImageFolder) -> tuple[str, bytes]:
    inside = stated
    if isinstance(stated, Mapping):
        inside = stated.get("bytes") or stated.get("path")
    if isinstance(inside, bytes | bytearray | memoryview):
        if not 0 < len(inside) <= MAX_IMAGE_FILE_BYTES:
            raise BadSample(
                f"its image has {len(inside)} bytes, expected 1 to {MAX_IMAGE_FILE_BYTES}"
            )
        return extension_of(bytes(inside)), bytes(inside)
    if not isinstance(inside, str) or not inside.strip():
        raise BadSample(f"its image is {str(inside)[:40]!r}, expected a path")
    return images.read(inside.strip())


def _text(row: Mapping[str, Any], use: str) -> str:
    value = row.get(use)
    if value is not None and not isinstance(value, str | int | float):
        raise BadSample(f"its {use} is a {type(value).__name__}, expected a text")
    text = "" if value is None else str(value).strip()
    if not text:
        raise BadSample(f"its {use} is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadSample(f"its {use} is not UTF-8: save the table as UTF-8") from None
    if size > MAX_TEXT_BYTES:
        raise BadSample(f"its {use} has {size} bytes, more than {MAX_TEXT_BYTES}")
    return text


def row_name(row: Mapping[str, Any]) -> str:
    """Return the image path of a row for messages, "" if it is not a text."""
    path = row.get("path")
    path = path.get("path") if isinstance(path, Mapping) else path
    return json.dumps(path)[:200].strip('"') if isinstance(path, str) else ""


@dataclass(frozen=True, kw_only=True)
class TableRows:
    """Rows of a table that are read together: ``count`` of them, or those at ``chosen`` indices."""

    path: Path
    count: int
    columns: Columns
    images: ImageFolder
    chosen: IntArray | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count if self.chosen is None else len(self.chosen)

    def subset(self: Rows, indices: IntArray) -> Rows:
        """Return a chunk with only the rows at these indices."""
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def wanted(self) -> Collection[int]:
        """Return the indices of the rows to read."""
        return range(self.count) if self.chosen is None else set(self.chosen.tolist())


Rows = TypeVar("Rows", bound=TableRows)


@dataclass(frozen=True, kw_only=True)
class CsvChunk(TableRows):
    """About a thousand rows, from one byte offset of the file, behind so many of its lines."""

    size: int
    start: int
    lines: int
    header: tuple[str, ...]
    delimiter: str

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the rows.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        wanted = self.wanted()
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise RuntimeError(f"{self.path} changed while it was read: start again")
            file.seek(self.start)
            rows = _rows(file, self.path, self.delimiter, self.lines)
            for index in range(self.count):
                row, _, (line, _) = next(rows)
                if index in wanted:
                    yield self._record(row, line)

    def _record(self, row: list[str], line: int) -> Record | InvalidRecord:
        stated = dict(zip(self.header, row, strict=False))
        values = {use: stated.get(name, "") for use, name in self.columns.names.items()}
        try:
            if len(row) != len(self.header):
                raise BadSample(f"its row has {len(row)} cells, the header has {len(self.header)}")
            return record_of(values, self.columns, self.images, f"line {line}")
        except BadSample as error:
            return InvalidRecord(row_name(values), str(error))


def open_table(
    path: Path,
    task_type: str | None = None,
    images: Path | None = None,
    task_column: str | None = None,
) -> InputData:
    """Open a csv or tsv file.

    Args:
        path: UTF-8, with a header, cells separated by comma, semicolon or tab.
        task_type: see `find_columns`.
        images: folder from which image paths start; None = that of the table.
        task_column: see `find_columns`.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the header lacks columns, the file is no table, or it has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    folder = open_image_folder(images or path.parent)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_MARK)) != _MARK:
            file.seek(0)
        start = file.tell()
        head = file.readline(_MAX_LINE).decode("utf-8", "replace")
        delimiter = max("\t,;", key=head.count) if any(sign in head for sign in "\t,;") else ","
        file.seek(start)
        rows = _rows(file, path, delimiter)
        header, start, (_, lines) = next(rows, ([], start, (1, 1)))
        columns = find_columns(header, task_type, str(path), task_column)
        starts, count = [(start, lines)], 0
        for count, (_, end, (_, lines)) in enumerate(rows, start=1):
            if count % _CHUNK_RECORDS == 0:
                starts.append((end, lines))
    if not count:
        raise ValueError(f"{path} has a header and no rows")
    counts = [min(_CHUNK_RECORDS, count - first) for first in range(0, count, _CHUNK_RECORDS)]
    chunks: list[Chunk] = [
        CsvChunk(
            path=path, count=own, columns=columns, images=folder, size=size, start=start,
            lines=lines, header=tuple(header), delimiter=delimiter,
        )
        for (start, lines), own in zip(starts, counts, strict=False)
    ]  # fmt: skip
    return InputData(
        columns.task_type, str(path), chunks, task_column=task_column or "", interleaved=True
    )


def _rows(
    file: BinaryIO, path: Path, delimiter: str, lines_before: int = 0
) -> Iterator[tuple[list[str], int, tuple[int, int]]]:
    """Yield every row that is not blank, its end offset, and its first and its last line.

    Reads from the current file position, which has ``lines_before`` lines before it.
    """
    end, number = file.tell(), lines_before

    def lines() -> Iterator[str]:
        nonlocal end, number
        while line := file.readline(_MAX_LINE):
            end, number = end + len(line), number + 1
            if len(line) == _MAX_LINE:
                raise ValueError(f"{path} has a line of more than {_MAX_LINE} bytes at {number}")
            # Bytes that are not UTF-8 are reported with the row that holds them.
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        first = number + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path} is no table, line {number} (counted from byte {end}) cannot be read "
                f"({error}): perhaps a quote was opened and not closed above it"
            ) from None
        if row:
            yield row, end, (first, number)
