"""What belongs together on a stream card: tasks, probes, sources, and the card as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmcl.core.card_entries import Card, SourceEntry, TaskEntry
from mmcl.core.card_fields import MAX_NAME, CardFields, shown

KINDS = ("caption", "classify", "retrieve", "answer", "prefer", "edit")
SUITED = {
    "classify": ("picture", "classify"),
    "caption": ("caption", "retrieve"),
    "retrieve": ("caption", "retrieve"),
    "answer": ("answer",),
}
"""Kind of a task -> kinds of sources whose rows can stand in one batch with its own."""

_STAGES = ("cpt", "dap", "cft")
_SCENARIOS = ("task", "class", "domain")
_DECODES = ("generate", "candidates")
_MAX_NEW_TOKENS = 64
_SHARED_KEYS = {
    "name", "description", "classes", "templates", "kind", "stage", "epochs", "text", "scorer",
    "decode", "max_new_tokens", "share", "mix",
}  # fmt: skip
_CARD_KEYS = _SHARED_KEYS | {
    "scenario", "licence", "source", "citation", "tasks", "probes", "sources", "hashes", "counts",
    "notes",
}  # fmt: skip
_TASK_KEYS = _SHARED_KEYS | {"train", "test", "size", "test_size", "labels"}
_SOURCE_KEYS = {
    "kind", "shards", "size", "classes", "templates", "text", "scored", "licence", "source",
    "citation", "description",
}  # fmt: skip


class CardReader(CardFields):
    """Reads the parts of a card and notes every fault instead of stopping at the first."""

    def card(self, raw: Any) -> Card:
        """Return the whole card."""
        if not isinstance(raw, Mapping):
            self.faults.append("the card is not a mapping of keys: start with 'name: ...'")
            raw = {}
        self.known_keys(raw, _CARD_KEYS, "the card")
        scenario = self.choice(raw, "scenario", _SCENARIOS, None, "the card")
        stated = self.names(raw, "classes", "the card")
        sources = self.sources(raw, stated)
        entries = raw.get("tasks")
        if not isinstance(entries, list) or not entries:
            self.faults.append("'tasks' is missing or empty: list at least one task")
            entries = []
        tasks = [self.task(entry, raw, stated, f"task {n}") for n, entry in enumerate(entries)]
        self.mixtures(tasks, sources)
        probes = raw.get("probes") or []
        if not isinstance(probes, list):
            self.faults.append(f"'probes' is {shown(probes)}, expected a list of test-only tasks")
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
            sources=tuple(sources),
            licence=self.string(raw, "licence", "the card"),
            description=self.string(raw, "description", "the card"),
            source=self.string(raw, "source", "the card"),
            citation=self.string(raw, "citation", "the card"),
            hashes=self.hashes(raw),
            counts=self.counts(raw),
        )

    def task(
        self,
        raw: Any,
        card: Mapping[str, Any],
        stated: tuple[str, ...],
        where: str,
        is_probe: bool = False,
    ) -> TaskEntry:
        """Return a task or probe; ``stated`` are the card's own classes."""
        if not isinstance(raw, Mapping):
            self.faults.append(
                f"{where} is {shown(raw)}, expected a mapping with name, train, test"
            )
            raw = {}
        if isinstance(raw.get("name"), str):
            where = f"{where} ({shown(raw['name'][:MAX_NAME])})"
        self.known_keys(raw, _TASK_KEYS, where)
        both = {**card, **raw}
        kind = self.choice(both, "kind", KINDS, "classify", where)
        own = self.names(raw, "classes", where)
        named = own or stated
        if kind == "classify" and not named:
            self.faults.append(f"{where} has no 'classes': name them here or at the top")
        known = set(stated)
        unknown = [name for name in own if stated and name not in known and not is_probe]
        if unknown:
            self.faults.append(
                f"{where} has classes {shown(unknown)} that the card's 'classes' lack"
            )
        train, test = self.parts(raw, where, is_probe)
        return TaskEntry(
            name=self.string(raw, "name", where, required=True),
            kind=kind,
            stage=self.choice(both, "stage", _STAGES, "cft", where),
            train=train,
            test=test,
            size=0 if is_probe else self.count(raw, "size", where),
            test_size=self.count(raw, "test_size", where),
            classes=named,
            templates=self.templates(raw, card, where),
            text=self.string(both, "text", where) or "txt",
            epochs=self.count(both, "epochs", where) or None,
            scorer=self.scorer(both, kind, where),
            decode=self.decode(both, kind, named, where),
            max_new_tokens=self.count(both, "max_new_tokens", where) or _MAX_NEW_TOKENS,
            share=None if is_probe else self.share(both, "share", where),
            mix=() if is_probe else self.mix(both, where),
        )

    def parts(
        self, raw: Mapping[str, Any], where: str, is_probe: bool
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the training shards and the test shards of a task."""
        test = self.shards(raw, "test", where)
        train = () if is_probe else self.shards(raw, "train", where)
        both = sorted(set(train) & set(test))
        if both:
            self.faults.append(f"{where} tests on shards it trains on: {shown(both)}")
        return train, test

    def decode(self, raw: Mapping[str, Any], kind: str, named: tuple[str, ...], where: str) -> str:
        """Return how answers are made."""
        decode = self.choice(raw, "decode", _DECODES, "generate", where)
        if decode == "candidates" and not (kind == "answer" and named):
            self.faults.append(
                f"{where} lets candidates compete (decode) but has kind {kind!r} and "
                f"{len(named)} 'classes': they are the answers of a task of kind 'answer'"
            )
        return decode

    def mix(self, raw: Mapping[str, Any], where: str) -> tuple[tuple[str, float], ...]:
        """Return (source, its part of every batch)."""
        value = raw.get("mix") or {}
        if not isinstance(value, Mapping):
            self.faults.append(
                f"{where} has mix {shown(value)}, expected name of a source: its share"
            )
            return ()
        shares = {str(name): self.share(value, name, f"{where}, mix") for name in value}
        return tuple((name, share) for name, share in shares.items() if share is not None)

    def sources(self, raw: Mapping[str, Any], stated: tuple[str, ...]) -> list[SourceEntry]:
        """Return the general and reference sets."""
        value = raw.get("sources") or {}
        if not isinstance(value, Mapping):
            self.faults.append(
                f"'sources' is {shown(value)}, expected name: kind and shards of each"
            )
            return []
        return [self.source(str(name), entry, stated) for name, entry in value.items()]

    def source(self, name: str, raw: Any, stated: tuple[str, ...]) -> SourceEntry:
        """Return one of them."""
        where = f"source {shown(name[:MAX_NAME])}"
        if not isinstance(raw, Mapping):
            self.faults.append(f"{where} is {shown(raw)}, expected a mapping with kind and shards")
            raw = {}
        self.known_keys(raw, _SOURCE_KEYS, where)
        kinds = tuple(dict.fromkeys(kind for suited in SUITED.values() for kind in suited))
        kind = self.choice(raw, "kind", kinds, "picture", where)
        classes = self.names(raw, "classes", where) or (stated if kind == "classify" else ())
        foreign = sorted(set(classes) - set(stated))
        if kind == "classify" and (foreign or not classes):
            self.faults.append(
                f"{where} is of kind 'classify' and has classes "
                f"{shown(foreign) if foreign else 'none'} that the card's own 'classes' lack: "
                "list them at the top"
            )
        scored = raw.get("scored", kind != "picture")
        if not isinstance(scored, bool) or (scored and kind == "picture"):
            self.faults.append(
                f"{where} has scored {shown(scored)}, expected true or false, and false for "
                "pictures alone, which have no loss of their own"
            )
        return SourceEntry(
            name=name,
            kind=kind,
            shards=self.shards(raw, "shards", where),
            size=self.count(raw, "size", where),
            classes=classes,
            templates=self.templates(raw, {}, where),
            text=self.string(raw, "text", where) or "txt",
            is_scored=scored is True,
        )

    def mixtures(self, tasks: Sequence[TaskEntry], sources: Sequence[SourceEntry]) -> None:
        """Check that what stands in one batch fits together."""
        kinds = {source.name: source.kind for source in sources}
        for task in tasks:
            where = f"task {shown(task.name[:MAX_NAME])}"
            for name, _ in task.mix:
                suited = SUITED.get(task.kind, ())
                if name not in kinds:
                    self.faults.append(
                        f"{where} mixes in {shown(name)}, which is none of the card's 'sources' "
                        f"({', '.join(kinds)[:MAX_NAME] or 'there are none'})"
                    )
                elif kinds[name] not in suited:
                    self.faults.append(
                        f"{where} is of kind '{task.kind}' and mixes in {shown(name)} of kind "
                        f"'{kinds[name]}', expected {' or '.join(suited) or 'no source'}: rows of "
                        "one batch carry the same things"
                    )
            taken = sum(share for _, share in task.mix) + (task.share or 0)
            if taken >= 1:
                self.faults.append(
                    f"{where} gives {taken:g} of every batch to recalled samples and sources "
                    "(share, mix): leave some to its own"
                )
