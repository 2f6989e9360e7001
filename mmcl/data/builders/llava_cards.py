"""Putting tasks on a card that may be there already, without touching the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmcl.core.atomic import write_atomic
from mmcl.core.card import read_card
from mmcl.data.builders.card import card_text

TOP = {"scenario": "domain", "kind": "answer", "stage": "cft"}
"""What a new card says of its tasks: nothing is told at test, answers are generated."""


def find_card(folder: Path) -> Path:
    """Find the card of a folder that a task is to be added to.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are several.
    """
    cards = sorted(path for path in folder.glob("*.yaml") if path.is_file())
    if not cards:
        raise FileNotFoundError(
            f"there is no card in {folder} to append to: leave out --append to start a stream"
        )
    if len(cards) > 1:
        names = ", ".join(path.name for path in cards)
        raise ValueError(f"{folder} has several cards ({names}): name one with --card")
    return cards[0]


def load_card(path: Path) -> dict[str, Any]:
    """Return a card's content after checking it; empty where there is no file.

    Raises:
        ValueError: listing every fault of the card.
    """
    if not path.is_file():
        return {}
    read_card(path)
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def put_tasks(
    card: Mapping[str, Any],
    tasks: Sequence[Mapping[str, Any]],
    hashes: Mapping[str, str],
    counts: Mapping[str, int],
) -> dict[str, Any]:
    """Return a card with these tasks: in the place of their namesakes, else at the end.

    Args:
        card: its content, with ``name`` and whatever it says at the top.
        tasks: entries with name, train, test and so on, and a kind unless it is "answer"; what
            the card says at the top and they must not inherit is stated in each.
        hashes: of all their shards.
        counts: samples of all their shards.
    """
    entries = {entry["name"]: entry for entry in card.get("tasks", ())}
    kept, counted = dict(card.get("hashes") or {}), dict(card.get("counts") or {})
    for task in tasks:
        for shard in _shards(entries.get(task["name"], {})):
            kept.pop(shard, None)
            counted.pop(shard, None)
        entries[task["name"]] = _standing_alone(task, card)
    rest = ("tasks", "hashes", "counts")
    return {
        **{key: value for key, value in card.items() if key not in rest},
        "tasks": list(entries.values()),
        "hashes": {**kept, **hashes},
        "counts": {**counted, **counts},
    }


def save_card(path: Path, content: Mapping[str, Any], header: Sequence[str]) -> None:
    """Write a card if it says something new; the comments at its top stay, others are lost.

    Args:
        path: of the card.
        content: all of it.
        header: comment lines that stand at the top, those that are there already not again.

    Raises:
        ValueError: if the card would be faulty; the old one stays.
    """
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    above: list[str] = []
    for line in old.splitlines():
        if not line.startswith("#"):
            break
        above.append(line.removeprefix("#").strip())
    text = card_text(content, [*above, *(line for line in header if line not in above)])
    if text != old:
        write_atomic(path, lambda temporary: _checked(temporary, text))


def _checked(temporary: Path, text: str) -> None:
    temporary.write_text(text, encoding="utf-8")
    read_card(temporary)


def _shards(entry: Mapping[str, Any]) -> list[str]:
    parts = (entry.get("train", ()), entry.get("test", ()))
    return [name for part in parts for name in ([part] if isinstance(part, str) else part)]


def _standing_alone(task: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """State in the task itself what it would otherwise inherit from a card of another kind."""
    own: dict[str, Any] = {}
    kind = task.get("kind", "answer")
    if card.get("kind", "classify") != kind:
        own["kind"] = kind
    if kind == "answer" and card.get("templates"):
        own["templates"] = ["{}"]
    if kind == "answer" and card.get("decode", "generate") != "generate":
        own["decode"] = "generate"
    rest = {key: task[key] for key in task if key not in ("name", "kind")}
    return {"name": task["name"], **own, **rest}
