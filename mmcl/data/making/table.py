"""Tables of text: csv and tsv with a header, read line by line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mmcl.data.faults import BadSample
from mmcl.data.making.columns import Columns, find_columns, record_of, shown
from mmcl.data.making.record import Piece, Record, Source, Unusable
from mmcl.data.shard import Numbers
from mmcl.data.shards.picture_files import PictureFolder, picture_folder

_PIECE = 1000
_MAX_LINE = 4 << 20
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TablePiece:
    """About a thousand rows, from one byte of the file on."""

    path: Path
    size: int
    start: int
    count: int
    header: tuple[str, ...]
    delimiter: str
    columns: Columns
    pictures: PictureFolder
    chosen: Numbers | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count if self.chosen is None else len(self.chosen)

    def some(self, places: Numbers) -> TablePiece:
        """Return a piece with the rows at these places alone."""
        return replace(self, chosen=places if self.chosen is None else self.chosen[places])

    def read(self) -> Iterator[Record | Unusable]:
        """Give the rows.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        wanted = range(self.count) if self.chosen is None else set(self.chosen.tolist())
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.size:
                raise RuntimeError(f"{self.path} changed while it was read: start again")
            file.seek(self.start)
            rows = _rows(file, self.path, self.delimiter)
            for place in range(self.count):
                row, _ = next(rows)
                if place in wanted:
                    yield self._record(row)

    def _record(self, row: list[str]) -> Record | Unusable:
        stated = dict(zip(self.header, row, strict=False))
        values = {use: stated.get(name, "") for use, name in self.columns.names.items()}
        try:
            if len(row) != len(self.header):
                raise BadSample(f"its row has {len(row)} cells, the header has {len(self.header)}")
            return record_of(values, self.columns.kind, self.pictures)
        except BadSample as fault:
            return Unusable(shown(values), str(fault))


def open_table(path: Path, kind: str | None = None, images: Path | None = None) -> Source:
    """Find the rows of a csv or tsv file.

    Args:
        path: UTF-8, with a header, cells divided by comma, semicolon or tab.
        kind: see `find_columns`.
        images: folder from which picture paths start; None = that of the table.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the header lacks columns, the file is no table, or it has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    pictures = picture_folder(images or path.parent)
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
        columns = find_columns(header, kind, str(path))
        starts, count = [start], 0
        for count, (_, end) in enumerate(rows, start=1):
            if count % _PIECE == 0:
                starts.append(end)
    if not count:
        raise ValueError(f"{path} has a header and no rows")
    counts = [min(_PIECE, count - first) for first in range(0, count, _PIECE)]
    pieces: list[Piece] = [
        TablePiece(path, size, start, own, tuple(header), delimiter, columns, pictures)
        for start, own in zip(starts, counts, strict=False)
    ]
    return Source(columns.kind, str(path), pieces, is_spread=True)


def _rows(file: BinaryIO, path: Path, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Give every row that is not blank and the byte behind it, from where the file stands."""
    place, number = file.tell(), 0

    def lines() -> Iterator[str]:
        nonlocal place, number
        while line := file.readline(_MAX_LINE):
            place, number = place + len(line), number + 1
            if len(line) == _MAX_LINE:
                raise ValueError(f"{path} has a line of more than {_MAX_LINE} bytes at {number}")
            # Bytes that are not UTF-8 are told with the row that holds them.
            yield line.decode("utf-8", "surrogateescape")

    reader = csv.reader(lines(), delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path} is no table, line {number} (counted from byte {place}) cannot be read "
                f"({error}): perhaps a quote was opened and not closed above it"
            ) from None
        if row:
            yield row, place
