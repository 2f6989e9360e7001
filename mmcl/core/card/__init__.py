"""Stream card: the YAML file that describes a stream, read with all its errors at once."""

from mmcl.core.card.card_reader import MAX_CARD_BYTES, card_schema, read_card, validate_card
from mmcl.core.card.schema import (
    MAX_ERRORS,
    MAX_SHARDS,
    Card,
    Decoding,
    KeyUntil,
    Scenario,
    SourceEntry,
    Stage,
    TaskEntry,
    expand,
)

__all__ = [
    "MAX_CARD_BYTES", "MAX_ERRORS", "MAX_SHARDS", "Card", "Decoding", "KeyUntil", "KeyUntil", "Scenario", "SourceEntry",
    "Stage", "TaskEntry", "card_schema", "expand", "read_card", "validate_card",
]  # fmt: skip
