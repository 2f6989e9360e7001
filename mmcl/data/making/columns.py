"""The columns of a table (csv, parquet) and what a row of it becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmcl.data.builders.llava_json import read_sample
from mmcl.data.faults import BadSample
from mmcl.data.making.record import Record
from mmcl.data.reader import MAX_TEXT_BYTES
from mmcl.data.shards.picture_files import MAX_PICTURE_BYTES, PictureFolder, extension_of

_NAMES = {
    "path": ("path", "image", "img", "file_name", "filename", "file"),
    "text": ("text", "caption"),
    "label": ("label", "class"),
    "question": ("question",),
    "answer": ("answer",),
    "task": ("task",),
    "split": ("split",),
}
"""What a column is for -> names that it may have, as in tables on the hub."""
_NEEDS = {
    "caption": ("path", "text"),
    "retrieve": ("path", "text"),
    "classify": ("path", "label"),
    "answer": ("question", "answer"),
}
_LAYOUTS = "path,text (captions), path,label (classes) or path,question,answer (questions)"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are used.

    Attributes:
        kind: of the task.
        names: what it is for -> the column's name in this table.
    """

    kind: str
    names: Mapping[str, str]


def find_columns(found: Sequence[str], kind: str | None, where: str) -> Columns:
    """Choose the columns of a table by their names, in capitals or not.

    Args:
        found: names of the table's columns.
        kind: "caption", "retrieve", "classify", "answer"; None takes what the columns allow.
        where: names the table.

    Raises:
        ValueError: if columns are missing, or more than one kind is possible.
    """
    plain = {name.strip().lower(): name for name in reversed(found)}
    names = {
        use: plain[next(name for name in known if name in plain)]
        for use, known in _NAMES.items()
        if any(name in plain for name in known)
    }
    listed = ", ".join(name[:40] if name.isprintable() else repr(name[:40]) for name in found[:20])
    if kind is None:
        possible = [
            name
            for name, needs in _NEEDS.items()
            if name != "retrieve" and all(need in names for need in needs)
        ]
        if not possible:
            raise ValueError(f"{where} has the columns {listed}: expected {_LAYOUTS}")
        if len(possible) > 1:
            raise ValueError(
                f"{where} has the columns {listed}, which could be {' or '.join(possible)}: say "
                "which with --kind"
            )
        kind = possible[0]
    missing = [need for need in _NEEDS[kind] if need not in names]
    if missing:
        raise ValueError(
            f"{where} lacks the column {' and '.join(missing)} that --kind {kind} needs, it has "
            f"{listed}: expected {_LAYOUTS}"
        )
    used = (*_NEEDS[kind], "path", "task", "split")
    return Columns(kind, {use: name for use, name in names.items() if use in used})


def record_of(row: Mapping[str, Any], kind: str, pictures: PictureFolder) -> Record:
    """Turn a row into a record.

    Args:
        row: use of a column -> its value: a text, a number, None; the picture may also be bytes,
            or a mapping with ``bytes`` and ``path`` as data sets on the hub have it.
        kind: of the task.
        pictures: from which paths start.

    Raises:
        BadSample: if a value is missing, or the picture is.
    """
    members: dict[str, bytes] = {}
    picture = row.get("path")
    if kind != "answer" or picture not in (None, ""):
        extension, data = _picture(picture, pictures)
        members[extension] = data
    if kind == "answer":
        said = {"text": _text(row, "question"), "answer": _text(row, "answer")}
        # Only whether there is a picture is looked at here, its bytes are in the members.
        members["json"] = read_sample({**said, "image": "x" if members else None}).data
    elif kind != "classify":
        members["txt"] = _text(row, "text").encode()
    return Record(
        "",
        members,
        _stated(row, "task"),
        _text(row, "label") if kind == "classify" else "",
        _part(row),
    )


def _picture(stated: Any, pictures: PictureFolder) -> tuple[str, bytes]:
    inside = stated
    if isinstance(stated, Mapping):
        inside = stated.get("bytes") or stated.get("path")
    if isinstance(inside, bytes | bytearray | memoryview):
        if not 0 < len(inside) <= MAX_PICTURE_BYTES:
            raise BadSample(
                f"its picture has {len(inside)} bytes, expected 1 to {MAX_PICTURE_BYTES}"
            )
        return extension_of(bytes(inside)), bytes(inside)
    if not isinstance(inside, str) or not inside.strip():
        raise BadSample(f"its picture is {str(inside)[:40]!r}, expected a path")
    return pictures.read(inside.strip())


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


def _stated(row: Mapping[str, Any], use: str) -> str:
    return _text(row, use) if use in row else ""


def _part(row: Mapping[str, Any]) -> str:
    part = _stated(row, "split").lower()
    if part not in ("", "train", "test"):
        raise BadSample(f"its split is {part[:40]!r}, expected train or test")
    return part


def shown(row: Mapping[str, Any]) -> str:
    """Return how a row is named for a person: by its picture's path, if that is a text."""
    path = row.get("path")
    path = path.get("path") if isinstance(path, Mapping) else path
    return json.dumps(path)[:200].strip('"') if isinstance(path, str) else ""
