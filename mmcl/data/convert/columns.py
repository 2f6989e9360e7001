"""Columns of a table (csv, parquet), and the conversion of its rows to records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmcl.data.convert.record import SPLITS, Record
from mmcl.data.errors import BadSample
from mmcl.data.shards.image_folder import MAX_IMAGE_BYTES, ImageFolder, extension_of
from mmcl.data.shards.llava_json import read_sample
from mmcl.data.shards.reader import MAX_TEXT_BYTES

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


def find_columns(found: Sequence[str], task_type: str | None, where: str) -> Columns:
    """Choose the columns of a table by their names, ignoring case.

    Args:
        found: names of the table's columns.
        task_type: "captioning", "retrieval", "classification", "instruction"; None takes what the
            columns allow.
        where: path for messages.

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
    if task_type is None:
        possible = [
            name
            for name, needs in _NEEDS.items()
            if name != "retrieval" and all(require_tasks in names for require_tasks in needs)
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


def record_of(row: Mapping[str, Any], task_type: str, images: ImageFolder) -> Record:
    """Convert a row of a table to a record.

    Args:
        row: field -> its value: a text, a number, None; the image may also be bytes, or a
            mapping with ``bytes`` and ``path`` as in data sets on the hub.
        task_type: of the task.
        images: folder from which image paths start.

    Raises:
        BadSample: if a value or the image is missing.
    """
    members: dict[str, bytes] = {}
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
    return Record(
        "",
        members,
        _optional_text(row, "task"),
        _text(row, "label") if task_type == "classification" else "",
        _split(row),
    )


def _image(stated: Any, images: ImageFolder) -> tuple[str, bytes]:
    inside = stated
    if isinstance(stated, Mapping):
        inside = stated.get("bytes") or stated.get("path")
    if isinstance(inside, bytes | bytearray | memoryview):
        if not 0 < len(inside) <= MAX_IMAGE_BYTES:
            raise BadSample(f"its image has {len(inside)} bytes, expected 1 to {MAX_IMAGE_BYTES}")
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


def _optional_text(row: Mapping[str, Any], use: str) -> str:
    return _text(row, use) if use in row else ""


def _split(row: Mapping[str, Any]) -> str:
    split = _optional_text(row, "split").lower()
    if split not in SPLITS:
        raise BadSample(f"its split is {split[:40]!r}, expected train or test")
    return split


def shown(row: Mapping[str, Any]) -> str:
    """Return the image path of a row for messages, "" if it is not a text."""
    path = row.get("path")
    path = path.get("path") if isinstance(path, Mapping) else path
    return json.dumps(path)[:200].strip('"') if isinstance(path, str) else ""
