"""The stream card: a YAML file that says what a stream is; read with all its faults at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmcl.core.card_entries import Card, TaskEntry
from mmcl.core.card_fields import expand
from mmcl.core.card_reader import CardReader
from mmcl.core.card_yaml import parse_yaml

__all__ = ["Card", "TaskEntry", "expand", "read_card", "survey_card"]

MAX_CARD_BYTES = 64 << 20
MAX_FAULTS = 100
"""Faults of a card that are written out; the rest is counted."""


def read_card(path: Path, scorers: Sequence[str] = ()) -> Card:
    """Read and check a card.

    Args:
        path: of the card.
        scorers: names that tasks may give theirs, none = any.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: one line for every fault found.
    """
    card, faults = survey_card(path, scorers)
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ValueError(f"stream card {path} has {count}:\n{lines}")
    return card


def survey_card(path: Path, scorers: Sequence[str] = ()) -> tuple[Card, list[str]]:
    """Read a card as far as it can be read.

    Args:
        path: of the card.
        scorers: names that tasks may give theirs, none = any.

    Returns:
        what it says, with defaults in place of what is wrong, and a line for every fault.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is no YAML at all.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no stream card {path}: build the stream (mmcl data build <name>) "
            "or give the path of a card"
        )
    if path.stat().st_size > MAX_CARD_BYTES:
        raise ValueError(f"{path} is larger than {MAX_CARD_BYTES} bytes: this is not a card")
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    faults: list[str] = []
    card = CardReader(faults, scorers).card(raw)
    if len(faults) > MAX_FAULTS:
        faults[MAX_FAULTS:] = [f"and {len(faults) - MAX_FAULTS} more"]
    return card, faults
