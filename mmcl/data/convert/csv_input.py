"""Input from csv and tsv tables with a header, read line by line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mmcl.data.convert.columns import Columns, find_columns, record_of, shown
from mmcl.data.convert.record import Chunk, InputData, InvalidRecord, Record
from mmcl.data.errors import BadSample
from mmcl.data.protocols import IntArray
from mmcl.data.shards.image_folder import ImageFolder, open_image_folder

_CHUNK_RECORDS = 1000
_MAX_LINE = 4 << 20
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TableChunk:
    """About a thousand rows, from one byte offset of the file."""

    path: Path
    size: int
    start: int
    count: int
    header: tuple[str, ...]
    delimiter: str
    columns: Columns
    images: ImageFolder
    chosen: IntArray | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count if self.chosen is None else len(self.chosen)

    def subset(self, indices: IntArray) -> TableChunk:
        """Return a chunk with only the rows at these indices."""
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the rows.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        wanted = range(self.count) if self.chosen is None else set(self.chosen.tolist())
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise RuntimeError(f"{self.path} changed while it was read: start again")
            file.seek(self.start)
            rows = _rows(file, self.path, self.delimiter)
            for index in range(self.count):
                row, _ = next(rows)
                if index in wanted:
                    yield self._record(row)

    def _record(self, row: list[str]) -> Record | InvalidRecord:
        stated = dict(zip(self.header, row, strict=False))
        values = {use: stated.get(name, "") for use, name in self.columns.names.items()}
        try:
            if len(row) != len(self.header):
                raise BadSample(f"its row has {len(row)} cells, the header has {len(self.header)}")
            return record_of(values, self.columns.task_type, self.images)
        except BadSample as error:
            return InvalidRecord(shown(values), str(error))


def open_table(path: Path, task_type: str | None = None, images: Path | None = None) -> InputData:
    """Open a csv or tsv file.

    Args:
        path: UTF-8, with a header, cells separated by comma, semicolon or tab.
        task_type: see `find_columns`.
        images: folder from which image paths start; None = that of the table.

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
        header, start = next(rows, ([], start))
        columns = find_columns(header, task_type, str(path))
        starts, count = [start], 0
        for count, (_, end) in enumerate(rows, start=1):
            if count % _CHUNK_RECORDS == 0:
                starts.append(end)
    if not count:
        raise ValueError(f"{path} has a header and no rows")
    counts = [min(_CHUNK_RECORDS, count - first) for first in range(0, count, _CHUNK_RECORDS)]
    chunks: list[Chunk] = [
        TableChunk(path, size, start, own, tuple(header), delimiter, columns, folder)
        for start, own in zip(starts, counts, strict=False)
    ]
    return InputData(columns.task_type, str(path), chunks, interleaved=True)


def _rows(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Yield every row that is not blank and its end offset, from the current file position."""
    end, number = file.tell(), 0

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
            yield row, end
