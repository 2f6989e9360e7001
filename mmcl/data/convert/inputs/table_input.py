"""Input from tables: their columns and rows, and csv and tsv, which are read line by line."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from mmcl.data.convert.inputs.column_names import is_image_name, key_of
from mmcl.data.convert.inputs.columns import ColumnOptions, Columns, find_columns
from mmcl.data.convert.inputs.image_search import open_images
from mmcl.data.convert.inputs.table_rows import TableRows, list_captions, row_name, table_input
from mmcl.data.convert.record import (
    InputData,
    InvalidRecord,
    Record,
    file_splits,
    without_validation,
)
from mmcl.data.shards.image_folder import MAX_IMAGE_FILE_BYTES, is_base64_image

_CHUNK_RECORDS = 1000
_MAX_LINE = 2 * MAX_IMAGE_FILE_BYTES
"""Longest line, and cell, in bytes: a cell may be an image in base64."""
_USUAL_CELL = 1 << 17
"""Longer cells are images, or begin with a quote that is never closed."""
_LOOKED_AT = 50
"""Rows by which a column of images is recognized."""
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_DELIMITERS = "\t,;|"
_MAX_VALUES = 100
TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class _Form:
    """Form of a csv file: its bytes, encoding, delimiter (a space in a list), and column names."""

    size: int
    encoding: str
    delimiter: str
    header: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CsvChunk(TableRows):
    """About a thousand rows, from one byte offset of the file, behind so many of its lines.

    ``shared`` has, for rows whose image others use, the value of their column ``index`` -> their
    offset and the lines before them.
    """

    start: int
    lines: int
    form: _Form
    shared: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def read(self) -> Iterator[Record | InvalidRecord]:
        """Yield the rows.

        Raises:
            RuntimeError: if the file changed since it was opened.
        """
        wanted = self.wanted()
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != self.form.size:
                raise RuntimeError(f"{self.path} changed while it was read: start again")
            file.seek(self.start)
            rows = _rows(file, self.path, self.form, self.lines)
            for index in range(self.count):
                row, _, (line, _) = next(rows)
                if index in wanted:
                    yield self._record(row, line)

    def _record(self, row: list[str], line: int) -> Record | InvalidRecord:
        header = self.form.header
        stated = dict(zip(header, row, strict=False))
        values = {use: stated.get(name, "") for use, name in self.columns.names.items()}
        if len(row) != len(header):
            reason = f"its row has {len(row)} cells, the header has {len(header)}"
            return InvalidRecord(row_name(values), reason)
        place = self.shared.get(values.get("path", "").strip())
        if place is not None:
            values["path"] = self._cell(place, self.columns.names["path"])
        return self.record(values, f"line {line}")

    def _cell(self, place: tuple[int, int], name: str) -> str:
        """Return a cell of the row at an offset of the file."""
        with self.path.open("rb") as file:
            file.seek(place[0])
            row, _, _ = next(_rows(file, self.path, self.form, place[1]))
        return row[self.form.header.index(name)]


def table_paths(folder: Path) -> list[Path]:
    """Return the csv and tsv files of a folder of tables, () if it is none.

    It is one if it has several at its top, or one and nothing else.
    """
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in TABLES and path.name[0] != "." and path.stem != "metadata"
    )
    others = [path for path in folder.iterdir() if path.name[0] != "." and path not in found]
    return found if len(found) > 1 or not others else []


def open_tables(
    path: Path,
    files: Sequence[Path],
    options: ColumnOptions,
    images: Path | Sequence[Path] | None = None,
) -> InputData:
    """Open a folder of csv and tsv files of the same columns, whose names may state their splits.

    Args:
        path: of the folder.
        files: see `table_paths`.
        options: see `find_columns`.
        images: folders from which image paths start; None = the folder.

    Raises:
        FileNotFoundError: if a folder is missing.
        ValueError: as `open_table`, or if a file has other columns, or a split of unknown name.
    """
    splits = file_splits(path, files)
    opened = [
        open_table(file, options, images, split) for file, split in zip(files, splits, strict=True)
    ]
    first = opened[0]
    for file, other in zip(files, opened, strict=True):
        if (other.task_type, other.text_field) != (first.task_type, first.text_field):
            raise ValueError(f"{file} has other columns than {files[0]}: convert them one by one")
    chunks, notes = without_validation([chunk for each in opened for chunk in each.chunks])
    notes += dict.fromkeys(note for each in opened for note in each.notes)
    return replace(first, where=str(path), chunks=chunks, notes=notes)


def open_table(
    path: Path,
    options: ColumnOptions,
    images: Path | Sequence[Path] | None = None,
    split: str = "",
) -> InputData:
    """Open a csv or tsv file, or a list of lines in a txt file.

    Args:
        path: UTF-8, or UTF-16 with a byte order mark, with a header, cells separated by comma,
            semicolon, tab or bar; a list has cells separated by spaces, named by ``columns``.
        options: see `find_columns`.
        images: folders from which image paths start; None = that of the table.
        split: of all its rows, "" if it states none.

    Raises:
        FileNotFoundError: if the file or the folder is missing.
        ValueError: if the header lacks columns, the file is no table, or it has no rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: correct the path")
    folder = open_images(images, path.parent, follow_links=options.follow_links)
    with path.open("rb") as file:
        form = _read_form(file, path, options)
        start = file.tell()
        rows = _rows(file, path, form)
        lines = 0
        if not options.columns:
            header, start, (_, lines) = next(rows, ([], start, (1, 1)))
            form = replace(form, header=tuple(header))
        inside = _image_columns(path, form, start, lines)
        peek = partial(_peek, path, form, start)
        columns = find_columns(form.header, options, str(path), images=inside, peek=peek)
        column = columns.names.get("path", "")
        shared = _SharedImages(form.header, column if column in inside else "")
        starts, count, has_lists = _chunk_starts(rows, (start, lines), form, columns, shared)
    if not count:
        raise ValueError(f"{path} has a header and no rows")
    columns = replace(columns, has_lists=has_lists or columns.has_lists)
    counts = [min(_CHUNK_RECORDS, count - first) for first in range(0, count, _CHUNK_RECORDS)]
    chunks = [
        CsvChunk(
            path=path, count=own, columns=columns, images=folder, start=start, lines=lines,
            form=form, split=split, shared=shared.found(),
        )
        for (start, lines), own in zip(starts, counts, strict=False)
    ]  # fmt: skip
    return table_input(path, chunks, columns, options, interleaved=True)


def _chunk_starts(
    rows: Iterator[tuple[list[str], int, tuple[int, int]]],
    start: tuple[int, int],
    form: _Form,
    columns: Columns,
    shared: _SharedImages,
) -> tuple[list[tuple[int, int]], int, bool]:
    """Read all rows behind an offset and its lines.

    Returns:
        Offset and lines before each chunk, the number of rows, and whether a text is a list.
    """
    starts, count, has_lists = [start], 0, False
    text = form.header.index(columns.names["text"]) if "text" in columns.names else -1
    for count, (row, end, (_, lines)) in enumerate(rows, start=1):
        has_lists = has_lists or (-1 < text < len(row) and len(list_captions(row[text])) > 0)
        shared.add(row, start)
        start = end, lines
        if count % _CHUNK_RECORDS == 0:
            starts.append(start)
    return starts, count, has_lists


class _SharedImages:
    """Rows with an image in base64 that other rows name by their column ``index``.

    VLMEvalKit's tables hold an image once, and the number of its row in the others.

    Args:
        header: of the table.
        column: of the image, "" if there is none.
    """

    def __init__(self, header: Sequence[str], column: str) -> None:
        keys = [key_of(name) for name in header]
        has_both = "index" in keys and column in header
        self.places = (keys.index("index"), header.index(column)) if has_both else None
        self.owners: dict[str, tuple[int, int]] = {}
        self.wanted: set[str] = set()

    def add(self, row: Sequence[str], place: tuple[int, int]) -> None:
        """Note a row at an offset, behind so many lines."""
        if self.places is None or len(row) <= max(self.places):
            return
        index, image = (row[column].strip() for column in self.places)
        if is_base64_image(image):
            self.owners[index] = place
        elif image:
            self.wanted.add(image)

    def found(self) -> dict[str, tuple[int, int]]:
        """Return the offset and the lines before every row whose image others use."""
        return {index: place for index, place in self.owners.items() if index in self.wanted}


def _image_columns(path: Path, form: _Form, start: int, lines: int) -> set[str]:
    """Return the columns that hold images in base64, by the first rows behind so many lines."""
    found: set[str] = set()
    with path.open("rb") as file:
        file.seek(start)
        for (row, _, _), _ in zip(_rows(file, path, form, lines), range(_LOOKED_AT), strict=False):
            cells = zip(form.header, row, strict=False)
            found |= {name for name, cell in cells if _holds_image(cell)}
    return found


def _holds_image(cell: str) -> bool:
    """Return whether a cell is an image in base64, or a list that begins with one."""
    first = re.split("['\"]", cell[:1000].lstrip("[ '\""), maxsplit=1)[0]
    return cell.startswith("data:image/") or is_base64_image(first)


def _read_form(file: BinaryIO, path: Path, options: ColumnOptions) -> _Form:
    """Return the form of a file, and leave it at its first row."""
    start = file.read(4)
    mark, encoding = next((pair for pair in _BOMS if start.startswith(pair[0])), (b"", "utf-8"))
    file.seek(len(mark))
    form = _Form(os.fstat(file.fileno()).st_size, encoding, ",", options.columns)
    head = _line(file, encoding).decode(encoding, "replace")
    if "\0" in head:
        raise ValueError(f"{path} is no table in UTF-8, it holds bytes of 0: save it as UTF-8")
    found = [sign for sign in _DELIMITERS if sign in head]
    is_list = path.suffix.lower() == ".txt" and not found
    delimiter = " " if is_list else max(found or ",", key=head.count)
    file.seek(len(mark))
    return replace(form, delimiter=delimiter)


def _peek(path: Path, form: _Form, start: int, column: str) -> set[str]:
    """Return the distinct values of a column, at most a hundred and one of them."""
    values: set[str] = set()
    place = form.header.index(column)
    with path.open("rb") as file:
        file.seek(start)
        for row, _, _ in _rows(file, path, form):
            if len(row) > place:
                values.add(row[place].strip())
            if len(values) > _MAX_VALUES:
                break
    return values


def _line(file: BinaryIO, encoding: str) -> bytes:
    """Return the next line in bytes, at most ``_MAX_LINE`` of them."""
    line = file.readline(_MAX_LINE)
    if encoding == "utf-8":
        return line
    end = b"\n\0" if encoding == "utf-16-le" else b"\0\n"
    # A byte 10 may also be half of another character.
    while line and len(line) < _MAX_LINE:
        if len(line) % 2:
            line += file.read(1)
        if line[-2:] == end:
            break
        more = file.readline(_MAX_LINE)
        if not more:
            break
        line += more
    return line


def _rows(
    file: BinaryIO, path: Path, form: _Form, lines_before: int = 0
) -> Iterator[tuple[list[str], int, tuple[int, int]]]:
    """Yield every row that is not blank, its end offset, and its first and its last line.

    Reads from the current file position, which has ``lines_before`` lines before it.
    """
    end, number, quotes = file.tell(), lines_before, 0

    def lines() -> Iterator[str]:
        nonlocal end, number, quotes
        while line := _line(file, form.encoding):
            end, number = end + len(line), number + 1
            if len(line) >= _MAX_LINE:
                raise ValueError(f"{path} has a line of more than {_MAX_LINE} bytes at {number}")
            quotes += line.count(b'"')
            # Bytes that are not UTF-8 are reported with the row that holds them.
            errors = "surrogateescape" if form.encoding == "utf-8" else "replace"
            yield line.decode(form.encoding, errors)

    if form.delimiter == " ":
        yield from ((row, end, (number, number)) for row in _words(lines(), len(form.header)))
        return
    # The limit is one for the process, and its default is below the size of an image.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))
    reader = csv.reader(lines(), delimiter=form.delimiter)
    while True:
        first, start, quotes = number + 1, end, 0
        try:
            row = next(reader)
            if end - start > _USUAL_CELL and quotes % 2 and number > first:
                raise csv.Error(
                    f"cell of {max(map(len, row))} characters over {number - first} lines"
                )
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path} is no table, line {number} (counted from byte {end}) cannot be read "
                f"({error}): perhaps a quote was opened and not closed above it"
            ) from None
        if row:
            yield row, end, (first, number)


def _words(lines: Iterator[str], count: int) -> Iterator[list[str]]:
    """Yield as many cells of a list's lines as there are columns: ``a b.jpg 3``, ``a.jpg a dog``.

    Spaces belong to the last cell if the first word is an image, else to the first cell.
    """
    for line in lines:
        if not line.strip():
            continue
        is_first = is_image_name(line.split(None, 1)[0])
        cut = str.split if is_first or count < 2 else str.rsplit
        yield cut(line, None, count - 1 if count > 1 else -1)
