"""Shards of a card where they are very many: their names as ranges, their hashes in a file.

A hash file is next to the card, which names it as its ``hashes`` (or ``counts``). It has one line a
shard: name, sha256 in hex and number of samples, separated by tabs; the last two may be empty.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card.schema import CardErrors, repr_short
from mmcl.core.card.shard_names import MAX_SHARDS, expand

MAX_INLINE = 1000
"""Shards that a writer lists on the card itself, one by one and with their hashes."""
_MAX_LINE = 1 << 12
_LISTED = 5
_LINE = re.compile(
    r"([^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*)"
    r"\t((?:[0-9a-fA-F]{64})?)\t([0-9]{0,18})\n?"
)
_LAST_NUMBER = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)", re.DOTALL)

Listed = tuple[dict[str, str], dict[str, int]]
"""Shard -> sha256, and shard -> number of samples, each for the shards whose line states it."""


def shard_list(names: Sequence[str]) -> list[str]:
    """Return the names of shards for a card; of very many, runs of numbers become one range."""
    if len(names) <= MAX_INLINE:
        return list(names)
    runs: list[list[str]] = []
    for name in names:
        if runs and name == _next_name(runs[-1][-1]):
            runs[-1].append(name)
        else:
            runs.append([name])
    ranges = ((_range_of(run[0], run[-1]), run) for run in runs)
    return [name for short, run in ranges for name in ([short] if expand(short) == run else run)]


def _next_name(name: str) -> str:
    """Return the name whose last number is one more: ``a-00009.tar`` -> ``a-00010.tar``."""
    parts = _LAST_NUMBER.fullmatch(name)
    return "" if parts is None else f"{parts[1]}{int(parts[2]) + 1:0{len(parts[2])}d}{parts[3]}"


def _range_of(first: str, last: str) -> str:
    parts, end = _LAST_NUMBER.fullmatch(first), _LAST_NUMBER.fullmatch(last)
    if first == last or parts is None or end is None:
        return first
    return f"{parts[1]}{{{parts[2]}..{end[2]}}}{parts[3]}"


def hash_file_name(card: Path) -> str:
    """Return the name of the hash file that a writer puts next to a card."""
    return f"{card.stem}.hashes.tsv"


def write_hash_file(path: Path, hashes: Mapping[str, str], counts: Mapping[str, int]) -> None:
    """Write a hash file atomically, in the order of the hashes, then of the other counts."""
    names = dict.fromkeys((*hashes, *counts))
    lines = (f"{name}\t{hashes.get(name, '')}\t{counts.get(name, '')}\n" for name in names)
    write_atomic(path, "".join(lines))


def read_hash_file(path: Path) -> Listed:
    """Read a hash file, line by line.

    Raises:
        ValueError: if it is missing or has wrong lines; the first are named by their numbers.
    """
    # Opening a pipe could block forever.
    if not path.is_file():
        raise ValueError(f"there is no file {path}: put it next to the card")
    wrong: list[str] = []
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            listed = _read_lines(file, wrong)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): write it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise ValueError(f"{path}: {'; '.join(wrong[:_LISTED])}{more}")
    return listed


def _read_lines(file: TextIO, wrong: list[str]) -> Listed:
    hashes: dict[str, str] = {}
    counts: dict[str, int] = {}
    names: set[str] = set()
    number = 0
    while line := file.readline(_MAX_LINE):
        number += 1
        found = _LINE.fullmatch(line)
        if found is None or found[1] in names or number > MAX_SHARDS:
            wrong.append(f"line {number} {_what(line, found, number)}")
            if number > MAX_SHARDS or len(wrong) > MAX_INLINE or len(line) == _MAX_LINE:
                break
            continue
        name, sha256, count = found.groups()
        names.add(name)
        if sha256:
            hashes[name] = sha256
        if count:
            counts[name] = int(count)
    return hashes, counts


def _what(line: str, found: re.Match[str] | None, number: int) -> str:
    if number > MAX_SHARDS:
        return f"is one of more than {MAX_SHARDS}: write larger shards"
    if found is not None:
        return f"names {repr_short(found[1])} again: list each shard once"
    return (
        f"is {repr_short(line.rstrip(chr(10)), 80)}, expected name, sha256 in hex and number of "
        "samples, separated by tabs"
    )


def take_hash_files(raw: Any, folder: Path, errors: CardErrors) -> dict[str, Any]:
    """Read the files that a card names in place of ``hashes`` and ``counts``.

    Args:
        raw: values of the card; these two are taken out where they name a file. The file of the
            hashes states the counts as well, unless the card has its own.
        folder: of the card.
        errors: what is wrong with the files is added.

    Returns:
        what the files state of ``hashes`` and ``counts``.
    """
    if not isinstance(raw, dict):
        return {}
    names = {key: raw[key] for key in ("hashes", "counts") if isinstance(raw.get(key), str)}
    if "hashes" in names and "counts" not in raw:
        names["counts"] = names["hashes"]
    files: dict[str, Listed] = {}
    found: dict[str, Any] = {}
    for key, name in names.items():
        raw.pop(key, None)
        if name not in files:
            try:
                if Path(name).name != name:
                    raise ValueError(f"{repr_short(name)} is a path, expected a file next to it")
                files[name] = read_hash_file(folder / name)
            except ValueError as error:
                errors.add(f"has {key} in a file that cannot be used: {error}")
                files[name] = {}, {}
        found[key] = files[name][key == "counts"]
    return found
