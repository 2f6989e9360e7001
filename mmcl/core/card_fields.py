"""Typed fields of a stream card; every fault is noted, and reading goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

MAX_SHARDS = 10_000_000


class CardFields:
    """Reads fields of nested mappings.

    Args:
        faults: takes a sentence for every fault.
        scorers: names that tasks may give theirs, none = any.
    """

    def __init__(self, faults: list[str], scorers: Sequence[str] = ()) -> None:
        self.faults, self.scorers = faults, scorers

    def known_keys(self, raw: Mapping[str, Any], known: set[str], where: str) -> None:
        """Note every key that is not known, with the nearest that is."""
        for key in raw:
            if key not in known:
                near = get_close_matches(str(key), known, n=1)
                hint = (
                    f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
                )
                self.faults.append(f"{where} has the unknown key '{key}': {hint}")

    def choice(
        self, raw: Mapping[str, Any], key: str, allowed: tuple[str, ...], default: str | None,
        where: str,
    ) -> str:  # fmt: skip
        """Return one of a few words."""
        value = raw.get(key, default)
        if value not in allowed:
            self.faults.append(f"{where} has {key} {value!r}, expected one of {', '.join(allowed)}")
            return allowed[0]
        return str(value)

    def string(self, raw: Mapping[str, Any], key: str, where: str, required: bool = False) -> str:
        """Return a text, "" where there is none."""
        value = raw.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or not value.strip():
            self.faults.append(f"{where} has {key} {value!r}, expected a text")
            return ""
        return value

    def scorer(self, raw: Mapping[str, Any], kind: str, where: str) -> str:
        """Return the scorer of a task of kind "answer", "" of others."""
        stated = self.string(raw, "scorer", where) or "exact"
        if kind != "answer":
            return ""
        # A name may be followed by the version of its rule, as in exact/1.
        if self.scorers and stated.partition("/")[0] not in self.scorers:
            near = get_close_matches(stated, self.scorers, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(self.scorers)}"
            self.faults.append(f"{where} has the unknown scorer '{stated}': {hint}")
        return stated

    def count(self, raw: Mapping[str, Any], key: str, where: str) -> int:
        """Return a whole number, 0 where there is none."""
        value = raw.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.faults.append(f"{where} has {key} {value!r}, expected a whole number, 0 or more")
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
        twice = (
            sorted({name for name in value if value.count(name) > 1})
            if (len(set(value)) < len(value))
            else []
        )
        if twice:
            self.faults.append(f"{where} names {twice} twice in {key}")
        return tuple(value)

    def templates(
        self, raw: Mapping[str, Any], card: Mapping[str, Any], where: str
    ) -> tuple[str, ...]:
        """Return the prompt templates, each with one ``{}``."""
        found = self.names({**card, **raw}, "templates", where)
        for template in found:
            if template.count("{}") != 1:
                self.faults.append(f"{where} has template {template!r}, expected exactly one {{}}")
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
            self.faults.append(f"{where} has {key} {value!r}, expected one or more shard names")
            return ()
        try:
            return tuple(shard for item in listed for shard in expand(item))
        except ValueError as error:
            self.faults.append(f"{where}, {key}: {error}")
            return ()

    def hashes(self, raw: Mapping[str, Any]) -> dict[str, str]:
        """Return shard name -> sha256."""
        value = raw.get("hashes") or {}
        if not isinstance(value, Mapping):
            self.faults.append(f"'hashes' is {value!r}, expected shard name: sha256")
            return {}
        return {str(key): str(item) for key, item in value.items()}

    def unique(self, names: list[str]) -> None:
        """Note names that come twice."""
        for name in sorted({name for name in names if name and names.count(name) > 1}):
            self.faults.append(f"two tasks are named '{name}': give each its own name")

    def counts(self, raw: Mapping[str, Any]) -> dict[str, int]:
        """Return shard name -> samples."""
        value = raw.get("counts") or {}
        if not isinstance(value, Mapping):
            self.faults.append(f"'counts' is {value!r}, expected shard name: samples")
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
                f"{where} has {key} {value!r}, expected more than 0 and less than 1: it is a part "
                "of every batch"
            )
            return None
        return float(value)


def expand(name: str) -> list[str]:
    """Expand one ``{000..004}`` range of a shard name, keeping leading zeros.

    Returns:
        The names, or the name itself when it holds no range.

    Raises:
        ValueError: if there are more than ``MAX_SHARDS``.
    """
    start, brace, rest = name.partition("{")
    inside, closing, end = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (brace and closing and dots and first.isdigit() and last.isdigit()):
        return [name]
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    if len(numbers) > MAX_SHARDS:
        raise ValueError(f"{name[:80]!r} names more than {MAX_SHARDS} shards: pack larger ones")
    return [s for n in numbers for s in expand(f"{start}{str(n).zfill(width)}{end}")]
