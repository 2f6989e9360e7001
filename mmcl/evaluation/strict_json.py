"""Strict JSON for the files of a run: finite numbers only, dataclasses as schema, named errors."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Count = Annotated[int, 0]
"""Whole number of at least 0."""
Amount = Annotated[float, 0]
"""Finite number of at least 0."""

_RENAMED = {
    "answer": "text",
    "done": "finished_tasks",
    "faults": "errors",
    "figures": "metrics",
    "kinds": "task_types",
    "last": "last_checkpoint",
    "picture": "image",
    "samples_recalled": "samples_replayed",
    "truth": "target",
}
"""Old keys of a run's files and their new names."""

_NAMES = {str: "string", bool: "boolean", int: "integer", float: "finite number", NoneType: "null"}
T = TypeVar("T")


def load(kind: type[T], raw: object, source: str, optional: Collection[str] = ()) -> T:
    """Make a dataclass from parsed JSON; its fields are the keys, their types the schema.

    Types are str, bool, int (63 bits), float (finite), None, ``Count``, ``Amount``, ``Literal`` of
    strings, sequences (read as tuples), mappings, unions and dataclasses of these.

    Args:
        kind: the dataclass; a ValueError of its ``__post_init__`` is reported like a wrong type.
        raw: from ``parse``.
        source: what the error calls it, such as the file's path.
        optional: keys that may be missing; all others must be there.

    Raises:
        ValueError: naming all wrong, missing and unknown keys at once.
    """
    try:
        value: T = _object(kind, raw, optional)
    except ValueError as error:
        raise ValueError(f"{source} is not valid: {error}: correct it or write it again") from None
    return value


def parse(text: str, source: str, *, has_nan: bool = False) -> object:
    """Read untrusted JSON text.

    Args:
        text: the text.
        source: what the error calls it, such as the file's path.
        has_nan: read NaN and the infinities, which other programs write, as null.

    Raises:
        ValueError: if it is not JSON, is nested too deep, or holds NaN or an infinity.
    """
    try:
        return (_NAN_DECODER if has_nan else _DECODER).decode(text)
    except RecursionError:
        raise ValueError(f"{source} is nested too deep to be read: write it again") from None
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}): write it again") from None


def read(path: Path) -> object:
    """Read a JSON file; see ``read_text`` and ``parse`` for the errors."""
    return parse(read_text(path), str(path))


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a run directory that has it")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): write it again") from None


def to_bytes(value: object, indent: int | None = 2) -> bytes:
    """Write plain values as UTF-8 JSON, one trailing newline, the same bytes each time.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate becomes \udxxx, which is exactly the escape JSON has for it.
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def is_number(value: object) -> bool:
    """Return whether a parsed value is a finite number and not a boolean."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e300 <= value <= 1e300


def renamed_keys(raw: Mapping[str, object], known: Collection[str]) -> list[str]:
    """Name the old keys of a file that have a new name, one sentence each.

    Args:
        raw: parsed object.
        known: keys that it may have.
    """
    return [f"the key {old!r} is called {new!r} now" for old, new in _renamed(raw, known).items()]


def _renamed(raw: Mapping[str, object], known: Collection[str]) -> dict[str, str]:
    old = [key for key in raw if key not in known and _RENAMED.get(key) in known]
    return {key: _RENAMED[key] for key in old}


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a finite number")


# json.loads makes a decoder for every call with options: most of the time of a short line.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_NAN_DECODER = json.JSONDecoder(parse_constant=lambda name: None)


def _object(kind: Any, raw: object, optional: Collection[str] = ()) -> Any:
    types = _types(kind)
    if not isinstance(raw, dict):
        raise ValueError(f"got {reprlib.repr(raw)}, expected {_describe(kind)}")
    renamed = _renamed(raw, types)
    present = {*raw, *renamed.values(), *optional}
    errors = renamed_keys(raw, types)
    errors += [f"{key!r} is missing" for key in types if key not in present]
    unknown = [key for key in raw if key not in types and key not in renamed]
    errors += [f"unknown keys {reprlib.repr(unknown)}"] if unknown else []
    values = {}
    for key in [key for key in types if key in raw]:
        try:
            values[key] = _convert(types[key], raw[key], repr(key))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    return kind(**values)


def _convert(kind: Any, raw: Any, name: str) -> Any:
    """Return a parsed value as a declared type, or raise a ValueError that names it."""
    if is_dataclass(kind):
        try:
            return _object(kind, raw)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in args:
            try:
                return _convert(each, raw, name)
            except ValueError:
                continue
    elif origin in (tuple, Sequence) and isinstance(raw, (list, tuple)):
        return tuple(_convert(args[0], each, f"{name}[{n}]") for n, each in enumerate(raw))
    elif origin is Mapping and isinstance(raw, dict):
        return {key: _convert(args[1], each, f"{name}[{key!r}]") for key, each in raw.items()}
    elif _is_scalar(kind, raw):
        return float(raw) if kind in (float, Amount) else raw
    raise ValueError(f"{name} is {reprlib.repr(raw)}, expected {_describe(kind)}")


def _is_scalar(kind: Any, raw: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_scalar(args[0], raw) and bool(raw >= args[1])
    if origin is Literal:
        return isinstance(raw, str) and raw in args
    if kind is float:
        return is_number(raw)
    return type(raw) is kind and (kind is not int or -(2**63) <= raw < 2**63)


def _describe(kind: Any) -> str:
    """Name a declared type in an error: "list of string", "integer of at least 0 or null"."""
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return f"object with {', '.join(each.name for each in fields(kind))}"
    if origin is Annotated:
        return f"{_describe(args[0])} of at least {args[1]}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe, args))
    if origin is Literal:
        return f"one of {', '.join(args)}"
    if origin in (tuple, Sequence):
        return f"list of {_describe(args[0])}"
    return f"object of {_describe(args[1])}" if origin is Mapping else _NAMES[kind]


@cache
def _types(kind: Any) -> dict[str, Any]:
    types = get_type_hints(kind, include_extras=True)
    return {each.name: types[each.name] for each in fields(kind)}
