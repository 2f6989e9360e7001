"""Records of a file that another program wrote: JSON, JSON lines, TSV, CSV or the first xlsx sheet.

xlsx is read here, because VLMEvalKit writes it and no library that mmcl needs can read it.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mmcl.evaluation import strict_json

SUFFIXES = (".json", ".jsonl", ".tsv", ".csv", ".xlsx")
ID_KEYS = (
    "question_id", "questionId", "id", "index", "qid", "sample_id", "doc_id", "image_id", "image",
)  # fmt: skip
"""Keys that name a sample, the first that a record has counts."""
MAX_XLSX_BYTES = 2**29
_LISTS = ("logs", "data", "annotations", "questions", "samples", "results", "predictions")
_FIELDS = ("resps", "prediction", "predict", "response", "text", "question", "prompt", "answer")
_MARKED = re.compile(r"_x([0-9A-Fa-f]{4})_")  # a control character in a cell of xlsx
_COLUMN = re.compile(r"[A-Z]+")

Record = tuple[str, dict[str, Any]]
"""Place of a record, for errors, and its values."""


class UnknownLayout(ValueError):
    """Error of a file whose layout is not one of predictions or right answers."""


def read_records(path: Path) -> list[Record]:
    """Read the records of a file.

    JSON is a list of objects, an object with such a list (VQAv2's ``annotations``, TextVQA's
    ``data``, lmms-eval's ``logs``), or an object of objects or answers by id (GQA, ScienceQA),
    whose ids become ``question_id``. A NaN is read as null. Empty cells of a table are left out.

    Raises:
        FileNotFoundError: if there is no such file.
        UnknownLayout: naming the keys that were found, if it is none of these.
        ValueError: naming the line, if it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".xlsx":
        return _table(path, _xlsx_rows(path))
    text = strict_json.read_text(path)
    if suffix in (".tsv", ".csv"):
        return _table(path, _csv_rows(text.removeprefix("\ufeff"), suffix))
    return _json_records(path, text.removeprefix("\ufeff"))


def name_keys(values: Iterable[str]) -> str:
    """Name the keys that were found in a file, at most twelve."""
    keys = list(values)
    more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
    return f"{', '.join(keys[:12]) or 'none'}{more}"


def _json_records(path: Path, text: str) -> list[Record]:
    lines = [(f"{path} line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    # An object over several lines is no JSON lines, and its first line is no JSON.
    is_whole = text.lstrip().startswith("[") or len(lines) == 1 or _is_open(lines)
    if not is_whole:
        parsed = [(where, strict_json.parse(line, where, has_nan=True)) for where, line in lines]
        return _objects(parsed)
    found = strict_json.parse(text, lines[0][0] if len(lines) == 1 else str(path), has_nan=True)
    if isinstance(found, list):
        return _objects((f"{path} entry {n}", each) for n, each in enumerate(found, 1))
    if not isinstance(found, dict):
        raise ValueError(f"{path} line 1 is {type(found).__name__}: expected an object")
    return _contained(path, found)


def _is_open(lines: Sequence[tuple[str, str]]) -> bool:
    first = lines[0][1].strip() if lines else ""
    return first == "{" or first.endswith(("{", "[", ","))


def _contained(path: Path, found: dict[str, Any]) -> list[Record]:
    for key in _LISTS:
        inside = found.get(key)
        if isinstance(inside, list) and inside and isinstance(inside[0], dict):
            return _objects((f"{path} {key} entry {n}", each) for n, each in enumerate(inside, 1))
    if any(key in found for key in (*ID_KEYS, *_FIELDS)):
        return [(f"{path} line 1", found)]
    if found and all(isinstance(value, dict) for value in found.values()):
        return [(f"{path} {key!r}", {"question_id": key, **value}) for key, value in found.items()]
    if found and all(isinstance(value, (str, int, float, list)) for value in found.values()):
        named = found.items()
        return [(f"{path} {key!r}", {"question_id": key, "answer": value}) for key, value in named]
    raise UnknownLayout(
        f"{path} holds one object with the keys {name_keys(found)}: expected a list of objects, "
        f"JSON lines, an object of objects by id, or a list under one of {', '.join(_LISTS)}"
    )


def _objects(found: Iterable[tuple[str, Any]]) -> list[Record]:
    records = list(found)
    for where, each in records:
        if not isinstance(each, dict):
            raise ValueError(f"{where} is {type(each).__name__}: expected an object")
    return records


def _csv_rows(text: str, suffix: str) -> list[list[str]]:
    # Benchmarks hold images in cells, as base64; the limit is one of the process.
    before = csv.field_size_limit(len(text) + 1)
    try:
        delimiter = "\t" if suffix == ".tsv" else ","
        return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    finally:
        csv.field_size_limit(before)


def _table(path: Path, rows: Sequence[Sequence[str]]) -> list[Record]:
    if not rows or not any(rows[0]):
        raise ValueError(f"{path} has no line of column names: write one above the rows")
    names, records = [name.strip() for name in rows[0]], []
    for number, row in enumerate(rows[1:], 2):
        if len(row) > len(names):
            raise ValueError(
                f"{path} row {number} has {len(row)} cells for {len(names)} columns: quote cells "
                "that hold the delimiter"
            )
        values = {name: cell for name, cell in zip(names, row, strict=False) if name and cell != ""}
        if values:
            records.append((f"{path} row {number}", values))
    return records


def _xlsx_rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a file that exists")
    try:
        with zipfile.ZipFile(path) as book:
            if sum(entry.file_size for entry in book.infolist()) > MAX_XLSX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_XLSX_BYTES:,} bytes")
            names = book.namelist()
            sheets = sorted(name for name in names if re.fullmatch(r"xl/worksheets/\w+\.xml", name))
            shared: list[str] = []
            if "xl/sharedStrings.xml" in names:
                shared = [_text(each) for each in _xml(book, "xl/sharedStrings.xml")]
            rows = [row for row in _xml(book, sheets[0]).iter() if _tag(row) == "row"]
        return [_cells(row, shared) for row in rows]
    except (zipfile.BadZipFile, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path} is not a readable xlsx ({error}): save it as .tsv") from None


def _xml(book: zipfile.ZipFile, name: str) -> ElementTree.Element:
    data = book.read(name)
    # Entities could expand without end; no program writes them into xlsx.
    if b"<!" in data:
        raise ValueError(f"{name} has declarations")
    return ElementTree.fromstring(data)


def _cells(row: ElementTree.Element, shared: Sequence[str]) -> list[str]:
    cells: list[str] = []
    for cell in row:
        place = _COLUMN.match(cell.get("r", ""))
        if place is not None:
            column = 0
            for letter in place[0]:
                column = 26 * column + ord(letter) - ord("A") + 1
            if column > 16384:  # the limit of the format
                raise ValueError(f"a cell is in column {place[0]}")
            cells += [""] * (column - 1 - len(cells))
        kind = cell.get("t", "n")
        value = next((each.text or "" for each in cell if _tag(each) == "v"), "")
        if kind == "s":
            cells.append(shared[int(value)])
        elif kind == "inlineStr":
            cells.append(_text(cell))
        else:
            cells.append(value.removesuffix(".0") if kind == "n" else _unmarked(value))
    return cells


def _text(element: ElementTree.Element) -> str:
    """Text of a shared or inline string, without the readings of Japanese characters."""
    parts = [e.text or "" for each in element for e in each.iter() if _tag(each) != "rPh"
             and _tag(e) == "t"]  # fmt: skip
    return _unmarked("".join(parts))


def _unmarked(text: str) -> str:
    return _MARKED.sub(lambda found: chr(int(found[1], 16)), text)


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
