"""What a stream card says, every field of it checked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskEntry:
    """A task as the card states it; see ``Task`` for the meaning of each field."""

    name: str
    kind: str
    stage: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    size: int
    test_size: int
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    text: str
    epochs: int | None
    scorer: str
    decode: str
    max_new_tokens: int
    share: float | None = None
    mix: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class SourceEntry:
    """A general or reference set as the card states it; see ``Source``."""

    name: str
    kind: str
    shards: tuple[str, ...]
    size: int
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    text: str
    is_scored: bool


@dataclass(frozen=True)
class Card:
    """A card whose every field was checked."""

    name: str
    scenario: str
    classes: tuple[str, ...]
    tasks: tuple[TaskEntry, ...]
    probes: tuple[TaskEntry, ...]
    sources: tuple[SourceEntry, ...] = ()
    licence: str = ""
    description: str = ""
    source: str = ""
    citation: str = ""
    hashes: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
