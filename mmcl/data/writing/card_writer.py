"""The card of a stream: writing it as YAML, and adding tasks without changing the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card import read_card
from mmcl.data.writing.shard_writer import ShardPlan


def card_text(card: Mapping[str, Any], header: Sequence[str]) -> str:
    """Return the YAML text of a card, short lists on one line, below a header of comments.

    Args:
        card: its fields, in the order in which they are written.
        header: lines such as the command that made it and the license.
    """
    comments = "".join(f"# {line}\n" for line in header)
    return comments + yaml.dump(
        dict(card), Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=100
    )


def card_task(
    name: str, train: Sequence[ShardPlan], test: Sequence[ShardPlan], **fields: Any
) -> dict[str, Any]:
    """Return the card entry of a task, with sizes summed over its shards.

    Args:
        name: of the task.
        train: training shards.
        test: test shards.
        fields: other keys of the entry, such as ``classes`` or ``text_field``.
    """
    return {
        "name": name,
        **fields,
        "train": [plan.name for plan in train],
        "test": [plan.name for plan in test],
        "size": sum(plan.count for plan in train),
        "test_size": sum(plan.count for plan in test),
    }


def card_counts(plans: Sequence[ShardPlan]) -> dict[str, int]:
    """Return the number of samples of each shard, for the key ``counts`` of a card."""
    return {plan.name: plan.count for plan in plans}


def find_card(folder: Path) -> Path:
    """Return the only card of a folder, to append a task to.

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
    """Return a card's content after checking it; empty if there is no file.

    Raises:
        ValueError: listing every error of the card.
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
    """Return a card's content with these tasks replaced by name, or added at the end.

    Args:
        card: its content, with ``name`` and the other top-level keys.
        tasks: entries with name, train, test and so on, and a task_type unless it is "instruction";
            defaults of the card that they must not inherit are overridden in each.
        hashes: of all their shards.
        counts: number of samples of all their shards.
    """
    entries = {entry["name"]: entry for entry in card.get("tasks", ())}
    kept, counted = dict(card.get("hashes") or {}), dict(card.get("counts") or {})
    for task in tasks:
        for shard in _shards(entries.get(task["name"], {})):
            kept.pop(shard, None)
            counted.pop(shard, None)
        entries[task["name"]] = _without_inherited(task, card)
    rest = ("tasks", "hashes", "counts")
    return {
        **{key: value for key, value in card.items() if key not in rest},
        "tasks": list(entries.values()),
        "hashes": {**kept, **hashes},
        "counts": {**counted, **counts},
    }


def save_card(path: Path, content: Mapping[str, Any], header: Sequence[str]) -> None:
    """Write a card if its text changed; comments at its top are kept, others are lost.

    Args:
        path: of the card.
        content: all of it.
        header: comment lines for the top, unless they are there already.

    Raises:
        ValueError: if the card would have errors; the old one is kept.
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
    splits = (entry.get("train", ()), entry.get("test", ()))
    return [name for names in splits for name in ([names] if isinstance(names, str) else names)]


def _without_inherited(task: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task entry that overrides what it would inherit from a card of another task type."""
    own: dict[str, Any] = {}
    task_type = task.get("task_type", "instruction")
    if card.get("task_type", "classification") != task_type:
        own["task_type"] = task_type
    if task_type == "instruction" and card.get("templates"):
        own["templates"] = ["{}"]
    if task_type == "instruction" and card.get("decoding", "generate") != "generate":
        own["decoding"] = "generate"
    rest = {key: task[key] for key in task if key not in ("name", "task_type")}
    return {"name": task["name"], **own, **rest}


class _CardDumper(yaml.SafeDumper):
    """YAML dumper without aliases, with lists of names on one line and other lists on several."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.SequenceNode:
    is_plain = all(isinstance(item, str) for item in data)
    # YAML may break a line inside a name of two words, which is valid but hard to read.
    fits = is_plain and (len(str(data)) <= 80 or not any(" " in item for item in data))
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=fits)


def _represent_dict(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.MappingNode:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=False)


_CardDumper.add_representer(list, _represent_list)
_CardDumper.add_representer(dict, _represent_dict)
