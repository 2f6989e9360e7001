"""Names of shards on a card: braces as in bash, joined lists, and patterns of file names."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

MAX_SHARDS = 10_000_000
"""Names of shards on one card."""
SUFFIXES = (".tar", ".loose.json")
"""Endings of the file names that a pattern finds."""

_RANGE = re.compile(r"([0-9]+)[.][.]([0-9]+)(?:[.][.]([0-9]+))?")
_LETTERS = re.compile(r"([a-z])[.][.]([a-z])|([A-Z])[.][.]([A-Z])")
_JOINED = re.compile(r"::(?![^\[]*\])")
"""webdataset's separator of shards; not the one inside of a host such as ``[::1]``."""
_VARIABLE = re.compile(r"[$](\w+|[{]\w+[}])")
_MAX_DEPTH = 8
_SHOWN, _MAX_QUOTED = 5, 120


class _Numbers(NamedTuple):
    """Range of numbers, written with at least so many digits."""

    values: range
    digits: int


_Parts: TypeAlias = "list[str | _Numbers | list[_Parts]]"
"""A name in parts: texts, ranges, and lists of alternatives, which are names in parts again."""


def find_shards(name: str, folder: Path, most: int) -> list[str]:
    """Return the shards that an entry of a card names.

    Args:
        name: a name, names in braces or joined by ``::``, or a pattern of local files (``*``,
            ``?``, ``[...]``, ``**``), which finds ``.tar`` and ``.loose.json``.
        folder: in which relative names start.
        most: largest number of names to return.

    Returns:
        The names; those that a pattern finds in natural order (``2.tar`` before ``10.tar``).

    Raises:
        ValueError: if there would be more names, a range descends, a pattern is one of addresses
            or finds nothing, or a name holds an environment variable.
    """
    if is_command(name):
        return expand(name, most)
    variable = _VARIABLE.search(name)
    if variable and not os.path.exists(folder / name):
        raise ValueError(
            f"{_quoted(name)} holds the environment variable {variable[0]}, which a card does "
            "not read: write the path out"
        )
    found: list[str] = []
    for joined in _JOINED.split(name):
        for each in expand(joined, most - len(found)):
            found += _matches(each, folder)
            if len(found) > most:
                raise _too_many(name)
    return found


def is_command(name: str) -> bool:
    """Return whether a shard is written by a command, whose text is left as it is."""
    return name.strip().lower().startswith("pipe:")


def expand(name: str, most: int = MAX_SHARDS) -> list[str]:
    """Expand the braces of a shard name as bash does.

    Args:
        name: as on the card: ``{000..004}``, ``{0..8..2}``, ``{a..c}``, ``{train,val}``, nested as
            well; leading zeros are kept. In a command only ``{000..004}`` is a range.
        most: largest number of names to return.

    Returns:
        The names, or the name itself if it has no braces of this kind.

    Raises:
        ValueError: if there would be more names, a name comes twice, or a range descends.
    """
    parts = _parse(name, _closing(name), 0, len(name), 0 if is_command(name) else _MAX_DEPTH)
    if _count(parts) > most:
        raise _too_many(name)
    found = list(_names(parts))
    if len(set(found)) < len(found):
        raise ValueError(f"{_quoted(name)} names a shard twice: write every name once")
    return found


def _too_many(name: str) -> ValueError:
    return ValueError(
        f"{_quoted(name)} names more than {MAX_SHARDS} shards, with those before it: write "
        "larger shards"
    )


def _closing(name: str) -> dict[int, int]:
    """Return the place of the closing brace of each opening one."""
    opened, closing = [], {}
    for place, sign in enumerate(name):
        if sign == "{":
            opened.append(place)
        elif sign == "}" and opened:
            closing[opened.pop()] = place
    return closing


def _parse(name: str, closing: dict[int, int], start: int, end: int, depth: int) -> _Parts:
    """Return texts, ranges and lists of alternatives of a part of a name."""
    parts: _Parts = []
    text = place = start
    while place < end:
        close = closing.get(place, end)
        inside = name[place + 1 : close] if close < end else ""
        made = _range(name, inside) if inside else None
        if made is None and depth and "," in inside:
            commas = _commas(name, closing, place, close)
            edges = itertools.pairwise([place, *commas, close])
            made = (
                [_parse(name, closing, a + 1, b, depth - 1) for a, b in edges] if commas else None
            )
        if made is None:
            place += 1
            continue
        parts += [name[text:place], made]
        text = place = close + 1
    return [*parts, name[text:end]]


def _commas(name: str, closing: dict[int, int], place: int, close: int) -> list[int]:
    """Return the places of the commas that separate the alternatives of a brace."""
    commas, place = [], place + 1
    while place < close:
        if name[place] == ",":
            commas.append(place)
        place = closing.get(place, place) + 1
    return commas


def _range(name: str, inside: str) -> _Numbers | list[_Parts] | None:
    letters = _LETTERS.fullmatch(inside)
    if letters:
        low, high = filter(None, letters.groups())
        return [[chr(letter)] for letter in _expect_names(name, range(ord(low), ord(high) + 1))]
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return None
    first, last, step = numbers[1], numbers[2], numbers[3] or "1"
    if max(len(first), len(last), len(step)) > 18:
        raise ValueError(f"{_quoted(name)} counts beyond {10**18}: correct the range")
    values = _expect_names(name, range(int(first), int(last) + 1, int(step) or 1))
    return _Numbers(values, len(first) if first.startswith("0") else 0)


def _expect_names(name: str, values: range) -> range:
    if not values:
        raise ValueError(f"{_quoted(name)} names no shard: write the smaller number first")
    return values


def _count(parts: _Parts) -> int:
    count = 1
    for part in parts:
        if isinstance(part, _Numbers):
            count *= len(part.values)
        elif isinstance(part, list):
            count *= sum(map(_count, part))
    return count


def _names(parts: _Parts) -> Iterator[str]:
    def choices(part: str | _Numbers | list[_Parts]) -> list[str]:
        if isinstance(part, str):
            return [part]
        if isinstance(part, _Numbers):
            return [str(number).zfill(part.digits) for number in part.values]
        return [each for alternative in part for each in _names(alternative)]

    yield from map("".join, itertools.product(*map(choices, parts)))


def _matches(name: str, folder: Path) -> list[str]:
    """Return the shards that a pattern finds in natural order, or the name if it is none."""
    if "://" in name:
        if "*" in name:
            raise ValueError(
                f"{_quoted(name)} is a pattern of addresses, and servers give no list of "
                "files: write {000..099}, or list the addresses"
            )
        return [name]
    if not name.endswith(SUFFIXES) and os.path.isdir(folder / name):
        raise ValueError(f"{_quoted(name)} is a folder: write {_quoted(f'{name}/*.tar')}")
    if not glob.has_magic(name) or os.path.exists(folder / name):
        return [name]
    if name.count("**") > 1:
        raise ValueError(f"{_quoted(name)} has ** more than once: write it once")
    pattern = str(Path(name).expanduser()) if name.startswith("~/") else name
    found = glob.glob(pattern, root_dir=folder, recursive=True)
    shards = [each for each in found if each.endswith(SUFFIXES) and (folder / each).is_file()]
    if not shards:
        raise ValueError(f"{_quoted(name)} finds no shard: {_content(pattern, folder, found)}")
    return sorted(shards, key=_natural)


def _content(pattern: str, folder: Path, found: list[str]) -> str:
    """Return what is there in place of shards."""
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts[:-1])
    inside = folder.joinpath(*plain)
    if not inside.is_dir():
        return f"there is no folder {_quoted(str(inside))}: correct the card"
    names = sorted(found or (path.name for path in inside.iterdir()), key=_natural)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    listed = ", ".join(map(_quoted, names[:_SHOWN])) or "nothing"
    where = "it matches" if found else f"the folder {_quoted(str(inside))} has"
    return f"{where} {listed}{more}, and a shard is a .tar or .loose.json: correct the card"


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a sorting key by which ``2.tar`` is before ``10.tar``."""
    return [(1, int(part)) if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _quoted(name: str) -> str:
    return repr(name if len(name) <= _MAX_QUOTED else f"{name[:_MAX_QUOTED]}...")
