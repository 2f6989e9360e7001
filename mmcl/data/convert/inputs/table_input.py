"""Input from tables: their columns and rows, and csv and tsv, which are read line by line."""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mmcl.data.convert.inputs.columns import (
    ColumnOptions,
    Columns,
    absent_names,
    find_columns,
    is_image_name,
    list_names,
    stated_split,
)
from mmcl.data.convert.inputs.image_search import ImageSearch, open_images
from mmcl.data.convert.record import (
    Chunk,
    InputData,
    InvalidRecord,
    Record,
    captions_member,
    task_name,
)
from mmcl.data.shards.image_folder import MAX_IMAGE_FILE_BYTES, extension_of
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, IntArray

_CHUNK_RECORDS = 1000
_MAX_LINE = 4 << 20
_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_DELIMITERS = "\t,;|"
_MAX_VALUES = 100
_MAX_CAPTIONS = 1000


def record_of(
    row: Mapping[str, Any],
    columns: Columns,
    images: ImageSearch,
    where: str,
    unused: tuple[str, ...] = (),
) -> Record:
    """Convert a row of a table, use -> value, to a record.

    A value is a text, a number or None; the image may also be bytes, or a mapping with ``bytes``
    and ``path`` as in data sets on the hub. ``where`` is the line or row, for messages.

    Raises:
        BadSample: if a value or the image is missing.
    """
    members: dict[str, bytes] = {}
    remarks: list[str] = []
    task_type = columns.task_type
    image = _only(row.get("path"), "image")
    if task_type != "instruction" or image not in (None, ""):
        extension, data = _image(image, images, remarks)
        members[extension] = data
    if task_type == "instruction":
        members["json"] = _conversation(row, bool(members), where)
    elif task_type != "classification":
        text = row.get("text")
        if columns.has_lists:
            members["json"] = captions_member(list_captions(text) or [_text(row, "text", where)])
        else:
            members["txt"] = _text({"text": _only(text, "text")}, "text", where).encode()
    task = task_name(row["task"], columns.names["task"], where) if "task" in row else ""
    label = ""
    if task_type == "classification":
        label = _text({"label": _only(row.get("label"), "label")}, "label", where)
    split = _split(row, columns, where)
    return Record("", members, task, label, split, tuple(remarks), unused)


def _only(value: Any, use: str) -> Any:
    """Return the only value of a list, another value as it is."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) == 1:
        return value[0]
    fix = {"label": "a sample has one class", "image": "a sample has one image"}
    raise BadSample(
        f"its {use} is a list of {len(value)} values, expected one" + f": {fix[use]}" * (use in fix)
    )


def _conversation(row: Mapping[str, Any], has_image: bool, where: str) -> bytes:
    answer = row.get("answer")
    stated = answer if isinstance(answer, list) else _text(row, "answer", where)
    texts = {"text": _text(row, "question", where), "answer": stated}
    # The path only tells that there is an image, whose bytes are in the members.
    return read_sample({**texts, "image": "x" if has_image else None}).data


def _split(row: Mapping[str, Any], columns: Columns, where: str) -> str:
    """Return the split of a row: of its column, else of its file."""
    if "split" not in columns.names:
        return str(row.get("file_split", ""))
    stated = _text(row, "split", where)
    split = stated_split(columns.names["split"], stated)
    if split is None:
        raise BadSample(f"its split is {stated[:40]!r}, expected train, val or test ({where})")
    return split


def list_captions(value: Any) -> list[str]:
    """Return the captions in a list, or in the text of a JSON or Python list, or in mappings.

    An empty list says that the value is no list of captions.
    """
    if isinstance(value, str):
        if not value.lstrip().startswith("[") or len(value) > MAX_TEXT_BYTES:
            return []
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return []
    if not isinstance(value, list | tuple) or len(value) > _MAX_CAPTIONS:
        return []
    texts = [_caption(one) for one in value]
    return texts if all(isinstance(text, str) for text in texts) else []


def _caption(value: Any) -> Any:
    """Return the text of a caption, which COCO's sentences hold as ``{"raw": text, ...}``."""
    if not isinstance(value, Mapping):
        return value
    return next((value[key] for key in ("raw", "caption", "text") if key in value), None)


def _image(stated: Any, images: ImageSearch, remarks: list[str]) -> tuple[str, bytes]:
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
    return images.read(inside.strip(), remarks)


def _text(row: Mapping[str, Any], use: str, where: str) -> str:
    value = row.get(use)
    if isinstance(value, float) and value.is_integer() and use == "label":
        value = int(value)  # tables store class numbers with gaps as floats
    if value is not None and not isinstance(value, str | int | float):
        raise BadSample(f"its {use} is a {type(value).__name__}, expected a text")
    text = "" if value is None or value != value else str(value).strip()  # NaN
    if not text:
        raise BadSample(f"its {use} is empty")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadSample(f"its {use} is not UTF-8 ({where}): save the table as UTF-8") from None
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
    """Rows of a table that are read together: ``count`` of them, or those at ``chosen`` indices.

    ``split`` is that of the whole file, "" if it states none.
    """

    path: Path
    count: int
    columns: Columns
    images: ImageSearch
    chosen: IntArray | None = None
    split: str = ""

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.count if self.chosen is None else len(self.chosen)

    def subset(self: Rows, indices: IntArray) -> Rows:
        """Return a chunk with only the rows at these indices."""
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def wanted(self) -> Collection[int]:
        """Return the indices of the rows to read."""
        return range(self.count) if self.chosen is None else set(self.chosen.tolist())

    def record(
        self, row: Mapping[str, Any], place: str, unused: tuple[str, ...] = ()
    ) -> Record | InvalidRecord:
        """Return the record of a row, use -> value, at a place in the file."""
        try:
            stated = {**row, "file_split": self.split}
            return record_of(stated, self.columns, self.images, place, unused)
        except BadSample as error:
            return InvalidRecord(row_name(row), str(error))


Rows = TypeVar("Rows", bound=TableRows)


@dataclass(frozen=True)
class _Form:
    """Form of a csv file: its bytes, encoding, delimiter (a space in a list), and column names."""

    size: int
    encoding: str
    delimiter: str
    header: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CsvChunk(TableRows):
    """About a thousand rows, from one byte offset of the file, behind so many of its lines."""

    start: int
    lines: int
    form: _Form

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
        return self.record(values, f"line {line}")


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
    folder = open_images(images, path.parent)
    with path.open("rb") as file:
        form = _read_form(file, path, options)
        start = file.tell()
        rows = _rows(file, path, form)
        lines = 0
        if not options.columns:
            header, start, (_, lines) = next(rows, ([], start, (1, 1)))
            form = replace(form, header=tuple(header))
        peek = partial(_peek, path, form, start)
        columns = find_columns(form.header, options, str(path), peek=peek)
        text = form.header.index(columns.names["text"]) if "text" in columns.names else -1
        starts, count, has_lists = [(start, lines)], 0, False
        for count, (row, end, (_, lines)) in enumerate(rows, start=1):
            has_lists = has_lists or (-1 < text < len(row) and len(list_captions(row[text])) > 0)
            if count % _CHUNK_RECORDS == 0:
                starts.append((end, lines))
    if not count:
        raise ValueError(f"{path} has a header and no rows")
    columns = replace(columns, has_lists=has_lists)
    counts = [min(_CHUNK_RECORDS, count - first) for first in range(0, count, _CHUNK_RECORDS)]
    chunks = [
        CsvChunk(
            path=path, count=own, columns=columns, images=folder, start=start, lines=lines,
            form=form, split=split,
        )
        for (start, lines), own in zip(starts, counts, strict=False)
    ]  # fmt: skip
    return table_input(path, chunks, columns, options, interleaved=True)


def table_input(
    path: Path, chunks: Sequence[Chunk], columns: Columns, options: ColumnOptions, **more: Any
) -> InputData:
    """Return the input of the chunks of a table; ``more`` are other fields of `InputData`."""
    notes = list(more.pop("notes", ()))
    if columns.unused:
        notes.append(f"not used of {path.name}: {list_names(columns.unused)}")
    notes += absent_names(path, columns.absent)
    return InputData(
        columns.task_type, str(path), chunks, task_column=options.task_column or "",
        text_field="json.captions" if columns.has_lists else "txt", notes=notes, **more,
    )  # fmt: skip


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
    end, number = file.tell(), lines_before

    def lines() -> Iterator[str]:
        nonlocal end, number
        while line := _line(file, form.encoding):
            end, number = end + len(line), number + 1
            if len(line) >= _MAX_LINE:
                raise ValueError(f"{path} has a line of more than {_MAX_LINE} bytes at {number}")
            # Bytes that are not UTF-8 are reported with the row that holds them.
            errors = "surrogateescape" if form.encoding == "utf-8" else "replace"
            yield line.decode(form.encoding, errors)

    if form.delimiter == " ":
        yield from ((row, end, (number, number)) for row in _words(lines(), len(form.header)))
        return
    reader = csv.reader(lines(), delimiter=form.delimiter)
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
