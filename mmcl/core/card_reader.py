"""Reads the fields of a stream card and notes every fault instead of stopping at the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mmcl.core.card_entries import Card, TaskEntry

KINDS = ("caption", "classify", "retrieve", "answer", "prefer", "edit")
STAGES = ("cpt", "dap", "cft")
SCENARIOS = ("task", "class", "domain")
DECODES = ("generate", "candidates")
MAX_NEW_TOKENS = 64

_CARD_KEYS = {
    "name", "description", "scenario", "licence", "source", "citation", "classes", "templates",
    "kind", "stage", "tasks", "probes", "hashes", "epochs", "text", "notes", "scorer", "decode",
    "max_new_tokens",
}  # fmt: skip
_TASK_KEYS = {
    "name", "description", "classes", "train", "test", "size", "test_size", "text", "kind",
    "stage", "templates", "epochs", "labels", "scorer", "decode", "max_new_tokens",
}  # fmt: skip


class CardReader:
    """Reads the parts of a card and notes every fault instead of stopping at the first."""

    def __init__(self, faults: list[str], scorers: Sequence[str] = ()) -> None:
        self.faults, self.scorers = faults, scorers

    def card(self, raw: Any) -> Card:
        if not isinstance(raw, Mapping):
            self.faults.append("the card is not a mapping of keys: start with 'name: ...'")
            raw = {}
        self.known_keys(raw, _CARD_KEYS, "the card")
        scenario = self.choice(raw, "scenario", SCENARIOS, None, "the card")
        stated = self.names(raw, "classes", "the card")
        entries = raw.get("tasks")
        if not isinstance(entries, list) or not entries:
            self.faults.append("'tasks' is missing or empty: list at least one task")
            entries = []
        tasks = [self.task(entry, raw, stated, f"task {n}") for n, entry in enumerate(entries)]
        probes = raw.get("probes") or []
        if not isinstance(probes, list):
            self.faults.append(f"'probes' is {probes!r}, expected a list of test-only tasks")
            probes = []
        scored = [
            self.task(entry, raw, stated, f"probe {n}", is_probe=True)
            for n, entry in enumerate(probes)
        ]
        self.unique([entry.name for entry in tasks + scored])
        return Card(
            name=self.string(raw, "name", "the card", required=True),
            scenario=scenario,
            classes=stated or tuple(dict.fromkeys(n for task in tasks for n in task.classes)),
            tasks=tuple(tasks),
            probes=tuple(scored),
            licence=self.string(raw, "licence", "the card"),
            hashes=self.hashes(raw),
        )

    def task(
        self,
        raw: Any,
        card: Mapping[str, Any],
        stated: tuple[str, ...],
        where: str,
        is_probe: bool = False,
    ) -> TaskEntry:
        if not isinstance(raw, Mapping):
            self.faults.append(f"{where} is {raw!r}, expected a mapping with name, train, test")
            raw = {}
        if isinstance(raw.get("name"), str):
            where = f"{where} ('{raw['name']}')"
        self.known_keys(raw, _TASK_KEYS, where)
        kind = self.choice({**card, **raw}, "kind", KINDS, "classify", where)
        own = self.names(raw, "classes", where)
        named = own or stated
        if kind == "classify" and not named:
            self.faults.append(f"{where} has no 'classes': name them here or at the top")
        unknown = [name for name in own if stated and name not in stated and not is_probe]
        if unknown:
            self.faults.append(f"{where} has classes {unknown} that the card's 'classes' lack")
        decode = self.choice({**card, **raw}, "decode", DECODES, "generate", where)
        if decode == "candidates" and not (kind == "answer" and named):
            self.faults.append(
                f"{where} lets candidates compete (decode) but has kind {kind!r} and "
                f"{len(named)} 'classes': they are the answers of a task of kind 'answer'"
            )
        test = self.shards(raw, "test", where)
        train = () if is_probe else self.shards(raw, "train", where)
        both = sorted(set(train) & set(test))
        if both:
            self.faults.append(f"{where} tests on shards it trains on: {both}")
        return TaskEntry(
            name=self.string(raw, "name", where, required=True),
            kind=kind,
            stage=self.choice({**card, **raw}, "stage", STAGES, "cft", where),
            train=train,
            test=test,
            size=0 if is_probe else self.count(raw, "size", where),
            test_size=self.count(raw, "test_size", where),
            classes=named,
            templates=self.templates(raw, card, where),
            text=self.string({**card, **raw}, "text", where) or "txt",
            epochs=self.count({**card, **raw}, "epochs", where) or None,
            scorer=self.scorer({**card, **raw}, kind, where),
            decode=decode,
            max_new_tokens=self.count({**card, **raw}, "max_new_tokens", where) or MAX_NEW_TOKENS,
        )

    def known_keys(self, raw: Mapping[str, Any], known: set[str], where: str) -> None:
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
        value = raw.get(key, default)
        if value not in allowed:
            self.faults.append(f"{where} has {key} {value!r}, expected one of {', '.join(allowed)}")
            return allowed[0]
        return str(value)

    def string(self, raw: Mapping[str, Any], key: str, where: str, required: bool = False) -> str:
        value = raw.get(key)
        if value is None and not required:
            return ""
        if not isinstance(value, str) or not value.strip():
            self.faults.append(f"{where} has {key} {value!r}, expected a text")
            return ""
        return value

    def scorer(self, raw: Mapping[str, Any], kind: str, where: str) -> str:
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
        value = raw.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.faults.append(f"{where} has {key} {value!r}, expected a whole number, 0 or more")
            return 0
        return value

    def names(self, raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
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
        found = self.names({**card, **raw}, "templates", where)
        for template in found:
            if template.count("{}") != 1:
                self.faults.append(f"{where} has template {template!r}, expected exactly one {{}}")
        return found or ("{}",)

    def shards(self, raw: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
        value = raw.get(key)
        listed = [value] if isinstance(value, str) else value
        if (
            not isinstance(listed, list)
            or not listed
            or not all(isinstance(item, str) and item for item in listed)
        ):
            self.faults.append(f"{where} has {key} {value!r}, expected one or more shard names")
            return ()
        return tuple(shard for item in listed for shard in expand(item))

    def hashes(self, raw: Mapping[str, Any]) -> dict[str, str]:
        value = raw.get("hashes") or {}
        if not isinstance(value, Mapping):
            self.faults.append(f"'hashes' is {value!r}, expected shard name: sha256")
            return {}
        return {str(key): str(item) for key, item in value.items()}

    def unique(self, names: list[str]) -> None:
        for name in sorted({name for name in names if name and names.count(name) > 1}):
            self.faults.append(f"two tasks are named '{name}': give each its own name")


def expand(name: str) -> list[str]:
    """Expand one ``{000..004}`` range of a shard name, keeping leading zeros.

    Returns:
        The names, or the name itself when it holds no range.
    """
    start, brace, rest = name.partition("{")
    inside, closing, end = rest.partition("}")
    first, dots, last = inside.partition("..")
    if not (brace and closing and dots and first.isdigit() and last.isdigit()):
        return [name]
    width = len(first) if first.startswith("0") else 0
    numbers = range(int(first), int(last) + 1)
    return [s for n in numbers for s in expand(f"{start}{str(n).zfill(width)}{end}")]
