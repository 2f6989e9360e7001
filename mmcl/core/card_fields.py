"""Typed fields of a stream card; every fault is noted, and reading goes on."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from reprlib import Repr
from typing import Any

MAX_SHARDS = 10_000_000
"""Names of shards on one card."""
MAX_NAME = 80
"""Characters of a name that are shown in a fault."""

_MAX_SHOWN = 200
_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 120, 120, 60, 3
_RANGE = re.compile(r"[{]([0-9]+)[.][.]([0-9]+)[}]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_BREAKS = re.compile(r"[\t\n]")


class CardFields:
    """Reads fields of nested mappings.

    Args:
        faults: takes a sentence for every fault.
        scorers: names that tasks may give theirs, none = any.
    """

    def __init__(self, faults: list[str], scorers: Sequence[str] = ()) -> None:
        self.faults, self.scorers = faults, scorers
        self.named_shards = 0

    def known_keys(self, raw: Mapping[str, Any], known: set[str], where: str) -> None:
        """Note every key that is not known, with the nearest that is."""
        for key in raw:
            if key not in known:
                near = get_close_matches(str(key)[:MAX_NAME], known, n=1)
                hint = (
                    f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
                )
                said = key if isinstance(key, str) else str(key)
                self.faults.append(f"{where} has the unknown key {shown(said)}: {hint}")

    def choice(
        self, raw: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str | None,
        where: str,
    ) -> str:  # fmt: skip
        """Return one of a few words."""
        value = raw.get(key, default)
        if value not in allowed:
            self.faults.append(
                f"{where} has {key} {shown(value)}, expected one of {', '.join(allowed)}"
            )
            return allowed[0]
        return str(value)

    def string(self, raw: Mapping[str, Any], key: str, where: str, required: bool = False) -> str:
        """Return a text, "" where there is none."""
        value = raw.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or not value.strip():
            self.faults.append(f"{where} has {key} {shown(value)}, expected a text")
            return ""
        return self.printable(value, key, where)

    def printable(self, text: str, key: str, where: str) -> str:
        """Return a text, "" if it holds what no terminal or file name should be given."""
        if _CONTROLS.search(text) or (key in ("name", "train", "test", "shards")
                                      and _BREAKS.search(text)):  # fmt: skip
            self.faults.append(f"{where} has {key} {shown(text)}, which holds control characters")
            return ""
        return text

    def scorer(self, raw: Mapping[str, Any], kind: str, where: str) -> str:
        """Return the scorer of a task of kind "answer", "" of others."""
        stated = self.string(raw, "scorer", where) or "exact"
        if kind != "answer":
            return ""
        # A name may be followed by the version of its rule, as in exact/1.
        if self.scorers and stated.partition("/")[0] not in self.scorers:
            near = get_close_matches(stated[:MAX_NAME], self.scorers, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.scorers)}"
            self.faults.append(f"{where} has the unknown scorer {shown(stated)}: {hint}")
        return stated

    def count(self, raw: Mapping[str, Any], key: str, where: str) -> int:
        """Return a whole number, 0 where there is none."""
        value = raw.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.faults.append(
                f"{where} has {key} {shown(value)}, expected a whole number, 0 or more"
            )
            return 0
        return value

    def names(self, raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
        """Return a list of texts without repeats."""
        value = raw.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.faults.append(
                f"{where} has {key} that are not a list of texts: quote names like 'yes' or '3'"
            )
            return ()
        twice = sorted(name for name, count in Counter(value).items() if count > 1)
        if twice:
            self.faults.append(f"{where} names {shown(twice)} twice in {key}")
        return tuple(self.printable(name, key, where) for name in value)

    def templates(
        self, raw: Mapping[str, Any], card: Mapping[str, Any], where: str
    ) -> tuple[str, ...]:
        """Return the prompt templates, each with one ``{}``."""
        found = self.names({**card, **raw}, "templates", where)
        for template in found:
            if template.count("{}") != 1:
                self.faults.append(
                    f"{where} has template {shown(template)}, expected exactly one {{}}"
                )
        return found or ("{}",)

    def shards(self, raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
        """Return the names of shards, ranges expanded."""
        value = raw.get(key)
        listed = [value] if isinstance(value, str) else value
        if (
            not isinstance(listed, list)
            or not listed
            or not all(isinstance(item, str) and item for item in listed)
        ):
            self.faults.append(
                f"{where} has {key} {shown(value)}, expected one or more shard names"
            )
            return ()
        found: list[str] = []
        try:
            for item in listed:
                named = expand(self.printable(item, key, where), MAX_SHARDS - self.named_shards)
                self.named_shards += len(named)
                found += named
        except ValueError as error:
            self.faults.append(f"{where}, {key}: {error}")
        return tuple(name for name in found if name)

    def hashes(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """Return shard name -> sha256."""
        value = raw.get("hashes") or {}
        if not isinstance(value, Mapping):
            self.faults.append(f"'hashes' is {shown(value)}, expected shard name: sha256")
            return {}
        wrong = [key for key, item in value.items() if not isinstance(item, str)]
        if wrong:
            self.faults.append(
                f"'hashes' of {shown(wrong)} are no texts, expected sha256 in quotes"
            )
        return {str(key): item for key, item in value.items() if isinstance(item, str)}

    def unique(self, names: list[str]) -> None:
        """Note names that come twice."""
        for name in sorted(name for name, count in Counter(names).items() if name and count > 1):
            self.faults.append(f"two tasks are named {shown(name)}: give each its own name")

    def counts(self, raw: Mapping[str, Any]) -> dict[str, int]:
        """Return shard name -> samples."""
        value = raw.get("counts") or {}
        if not isinstance(value, Mapping):
            self.faults.append(f"'counts' is {shown(value)}, expected shard name: samples")
            return {}
        found = {str(key): self.count(value, key, "'counts'") for key in value}
        return {name: count for name, count in found.items() if count}

    def share(self, raw: Mapping[str, Any], key: str, where: str) -> float | None:
        """Return a part of every batch, None where nothing is said."""
        value = raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            self.faults.append(
                f"{where} has {key} {shown(value)}, expected more than 0 and less than 1: it is a "
                "part of every batch"
            )
            return None
        return float(value)


def shown(value: Any) -> str:
    """Return what stands for a value in a fault: on one line, at most some 200 characters."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def expand(name: str, most: int = MAX_SHARDS) -> list[str]:
    """Expand the ``{000..004}`` ranges of a shard name, keeping leading zeros.

    Args:
        name: as the card has it.
        most: names that it may stand for.

    Returns:
        The names, or the name itself when it holds no range.

    Raises:
        ValueError: if there are more, or a range goes down.
    """
    parts = _RANGE.split(name)
    texts, edges = parts[::3], list(zip(parts[1::3], parts[2::3], strict=True))
    if any(max(map(len, edge)) > 18 for edge in edges):
        raise ValueError(f"{shown(name)} counts beyond {10**18}: correct the range")
    ranges = [range(int(first), int(last) + 1) for first, last in edges]
    if not all(ranges):
        raise ValueError(f"{shown(name)} names no shard: write the smaller number first")
    if math.prod(map(len, ranges)) > most:
        raise ValueError(
            f"{shown(name)} names more than {MAX_SHARDS} shards, with those before it: pack "
            "larger ones"
        )
    widths = [len(first) if first.startswith("0") else 0 for first, _ in edges]
    return [
        texts[0] + "".join(
            str(number).zfill(width) + text
            for number, width, text in zip(numbers, widths, texts[1:], strict=True)
        )
        for numbers in itertools.product(*ranges)
    ]  # fmt: skip
