"""Stream card: the YAML file that describes a stream, read with all its errors at once."""

from mmcl.core.card.card_reader import (
    MAX_CARD_BYTES,
    SOURCE_TYPES,
    card_schema,
    read_card,
    validate_card,
)
from mmcl.core.card.schema import (
    MAX_ERRORS,
    Ability,
    Card,
    Decoding,
    EvalOnlyEntry,
    KeyUntil,
    Knowledge,
    Scenario,
    Shift,
    SourceEntry,
    Stage,
    TaskEntry,
)
from mmcl.core.card.shard_names import MAX_SHARDS, expand

__all__ = [
    "MAX_CARD_BYTES", "MAX_ERRORS", "MAX_SHARDS", "SOURCE_TYPES", "Ability", "Card", "Decoding",
    "EvalOnlyEntry", "KeyUntil", "Knowledge", "Scenario", "Shift", "SourceEntry", "Stage",
    "TaskEntry", "card_schema", "expand", "read_card", "validate_card",
]  # fmt: skip
