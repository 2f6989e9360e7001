"""Removal of a task, an eval-only task or a source from a card: ``mmcl data remove``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.core.card import read_card
from mmcl.core.card.schema import Card, SourceEntry, TaskEntry, nearest
from mmcl.data.remote.file_lock import file_lock
from mmcl.data.remote.location import is_remote
from mmcl.data.shards.json_shard import SUFFIX, read_json_set
from mmcl.data.shards.stream_writer import listed_shards, load_card, save_card
from mmcl.data.stored_sample import BadShard

SECTIONS = ("tasks", "eval_only", "sources")
"""Keys of a card that list what can be removed."""
ROLES = dict(zip(SECTIONS, ("task", "eval-only task", "source"), strict=True))


@dataclass(frozen=True)
class RemovedTask:
    """What was removed from a card, and what stays.

    Attributes:
        section: one of ``SECTIONS``.
        position: its index among the tasks before the removal, and how many came after it.
        unused: shards of the folder that no card of it lists any more.
        kept: shard -> why it is not among these.
        dropped_classes: last classes of the card, which no task has any more.
        unused_classes: classes that no task has any more and that stay, as others come after them.
    """

    section: str
    position: tuple[int, int]
    unused: tuple[str, ...]
    kept: Mapping[str, str]
    dropped_classes: tuple[str, ...]
    unused_classes: tuple[str, ...]


def remove_task(
    path: Path, name: str, section: str | None = None, *, delete_shards: bool = False
) -> RemovedTask:
    """Remove a task, an eval-only task or a source from a card.

    The numbers of all classes stay. The card is replaced at once, and shards are deleted after it.

    Args:
        path: of the card.
        name: of what is removed.
        section: one of ``SECTIONS``, where two have this name; None = the only one.
        delete_shards: delete its shards in the card's folder that no card of the folder lists.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if the card has errors or no such task, if it is the only task, or if a task
            mixes the source in.
    """
    with file_lock(path.parent):
        card, content = read_card(path), load_card(path)
        section = _section_of(card, name, section)
        _expect_removable(card, name, section)
        entries = _entries(card, section)
        position = list(entries).index(name)
        left = card.model_copy(update={section: _without(getattr(card, section), name)})
        classes, unused_classes = _classes_left(card, left)
        listed = set(_shards_of(left))
        own = [shard for shard in dict.fromkeys(_shards(entries[name])) if shard not in listed]
        save_card(path, _content_left(content, section, name, classes, own, left), [])
        kept = {
            shard: "the card lists it elsewhere"
            for shard in dict.fromkeys(_shards(entries[name]))
            if shard in listed
        }
        kept |= _kept_shards(path, own)
        unused = tuple(shard for shard in own if shard not in kept)
        for shard in unused if delete_shards else ():
            _delete(path.parent / shard)
    return RemovedTask(
        section, (position, len(entries) - position - 1), unused, kept,
        card.classes[len(classes) :], unused_classes,
    )  # fmt: skip


def _entries(card: Card, section: str) -> dict[str, TaskEntry | SourceEntry]:
    entries = getattr(card, section)
    return dict(entries) if section == "sources" else {entry.name: entry for entry in entries}


def _section_of(card: Card, name: str, section: str | None) -> str:
    found = [each for each in SECTIONS if name in _entries(card, each)]
    found = [each for each in found if section in (None, each)]
    if not found:
        known = [each for key in SECTIONS if section in (None, key) for each in _entries(card, key)]
        where = ROLES[section] if section else "task, eval-only task or source"
        raise ValueError(f"card '{card.name}' has no {where} {name!r}: {nearest(name, known)}")
    if len(found) > 1:
        raise ValueError(
            f"card '{card.name}' has a {' and a '.join(ROLES[each] for each in found)} {name!r}: "
            f"say which with --section {' or '.join(found)}"
        )
    return found[0]


def _expect_removable(card: Card, name: str, section: str) -> None:
    if section == "tasks" and len(card.tasks) == 1:
        raise ValueError(f"{name!r} is the only task of '{card.name}': delete the card instead")
    mixing = [task.name for task in card.tasks if section == "sources" and name in task.mixture]
    if mixing:
        raise ValueError(
            f"source {name!r} is mixed into {', '.join(map(repr, mixing[:5]))}: take it out of "
            "their 'mixture' first"
        )


def _without(entries: Any, name: str) -> Any:
    if isinstance(entries, Mapping):
        return {key: entry for key, entry in entries.items() if key != name}
    return tuple(entry for entry in entries if entry.name != name)


def _classes_left(card: Card, left: Card) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the classes without the last ones that nothing has, and others that nothing has."""
    used: set[str] = set()
    entries: list[Any] = [*left.tasks, *left.eval_only, *left.sources.values()]
    for entry in entries:
        is_candidates = getattr(entry, "decoding", "") == "candidates"
        if entry.task_type == "classification" or is_candidates:
            used.update(entry.classes)
    had = {name for entry in (*card.tasks, *card.eval_only) for name in entry.classes}
    size = len(card.classes)
    while size and card.classes[size - 1] not in used and card.classes[size - 1] in had:
        size -= 1
    classes = card.classes[:size]
    return classes, tuple(name for name in classes if name not in used)


def _content_left(
    content: dict[str, Any], section: str, name: str, classes: Sequence[str],
    shards: Sequence[str], left: Card,
) -> dict[str, Any]:  # fmt: skip
    """Return the values of a card without an entry and what only this entry needed."""
    entries = content[section]
    if section == "sources":
        entries = {key: entry for key, entry in entries.items() if key != name}
    else:
        entries = [entry for entry in entries if entry["name"] != name]
    changed = {**content, section: entries}
    if not entries:
        del changed[section]
    derived = list(dict.fromkeys(each for task in left.tasks for each in task.classes))
    if "classes" in content:
        changed["classes"] = list(classes)
    elif derived != list(classes):
        # Without it the classes would be numbered as the tasks that are left have them.
        before = {key: value for key, value in changed.items() if key != "tasks"}
        changed = {**before, "classes": list(classes), "tasks": changed["tasks"]}
    if named := {k: v for k, v in (content.get("class_names") or {}).items() if k in set(classes)}:
        changed["class_names"] = named
    else:
        changed.pop("class_names", None)
    for key in ("hashes", "counts"):
        stated = {k: v for k, v in (content.get(key) or {}).items() if k not in set(shards)}
        if key in changed:
            changed[key] = stated
        if not stated:
            changed.pop(key, None)
    return changed


def _shards(entry: Any) -> list[str]:
    if isinstance(entry, SourceEntry):
        return list(entry.shards)
    return [*entry.train, *entry.test]


def _shards_of(card: Card) -> Iterator[str]:
    for entry in (*card.tasks, *card.eval_only, *card.sources.values()):
        yield from _shards(entry)


def _kept_shards(path: Path, shards: Sequence[str]) -> dict[str, str]:
    """Return why each of some shards that a card no longer lists is to be kept."""
    folder = path.parent.resolve()
    others = {
        shard: card.name
        for card in sorted(path.parent.glob("*.yaml"))
        if card.is_file() and card.resolve() != path.resolve()
        for shard in listed_shards(card, shards)
    }
    kept: dict[str, str] = {}
    for shard in shards:
        if is_remote(shard) or shard.lower().startswith("file:"):
            kept[shard] = "it is an address"
        elif not (folder / shard).resolve().is_relative_to(folder):
            kept[shard] = "it is outside of the card's folder"
        elif shard in others:
            kept[shard] = f"{others[shard]} lists it"
    return kept


def _delete(shard: Path) -> None:
    """Delete a shard with its index; of one in place, only the files that point at its data."""
    if shard.name.endswith(SUFFIX):
        try:
            indices = read_json_set(shard).indices
        except BadShard:
            indices = ""
        if indices and Path(indices).name == indices:
            (shard.parent / indices).unlink(missing_ok=True)
    shard.unlink(missing_ok=True)
    shard.with_name(f"{shard.name}.index").unlink(missing_ok=True)
