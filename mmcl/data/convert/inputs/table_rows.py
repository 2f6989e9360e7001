"""Rows of tables as records, whatever file the table is: image, text, label, question, turns."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmcl.data.convert.inputs.column_names import QUESTION_USES
from mmcl.data.convert.inputs.columns import (
    ColumnOptions,
    Columns,
    absent_names,
    list_names,
    stated_split,
)
from mmcl.data.convert.inputs.image_search import ImageSearch
from mmcl.data.convert.record import (
    Chunk,
    InputData,
    InvalidRecord,
    Record,
    captions_member,
    task_name,
)
from mmcl.data.image_formats import as_members
from mmcl.data.question_options import is_absent
from mmcl.data.shards.image_folder import load_image
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, IntArray

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
    remarks: list[str] = []
    task_type = columns.task_type
    read = partial(images.read, remarks=remarks)
    if task_type == "instruction":
        sample = read_sample(instruction_of(row, where))
        members = as_members([load_image(image, read) for image in sample.images])
        members["json"] = sample.data
    else:
        members = as_members([load_image(_only(row.get("path"), "image"), read)])
    if task_type in ("captioning", "retrieval"):
        text = row["text"] if "text" in row else _numbered_captions(row)
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


def instruction_of(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the instruction record of a row, use -> value, under the keys of JSON records."""
    raw = {use: row[use] for use in (*QUESTION_USES, "input") if use in row}
    raw |= {use[-1]: value for use, value in row.items() if use.startswith("option#")}
    numbered = [value for use, value in row.items() if use.startswith("path#")]
    raw["images"] = row.get("path") or [image for image in numbered if not is_absent(image)]
    if "turns" in row:
        return {**raw, "conversations": row["turns"]}
    answer = row.get("answer")
    is_kept = isinstance(answer, list | int | float) and answer == answer
    raw["answer"] = answer if is_kept else _text(row, "answer", where)
    raw["instruction" if "input" in row else "question"] = _text(row, "question", where)
    return raw


def _numbered_captions(row: Mapping[str, Any]) -> list[Any]:
    """Return the captions in columns of their own, of which some may be empty."""
    values = [value for use, value in row.items() if use.startswith("text#")]
    return [value for value in values if not is_absent(value)]


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
