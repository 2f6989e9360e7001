"""Writer of a stream, its shards and its card; resumes after a kill and ends with the same bytes.

A builder lists what it will write as `ShardPlan`, and `build_stream` writes the shards, each to a
temporary name that is renamed when it is complete, then the cards. Next to them it keeps
`<stream>.build.json`, the recipe of the build and the hash of every finished shard: shards that
match are not written again, and a folder made by another recipe is written from scratch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from webdataset.writer import TarWriter

from mmcl.core.atomic_write import write_atomic
from mmcl.core.card import read_card, validate_card
from mmcl.core.card.schema import CardErrors
from mmcl.core.card.shard_lists import (
    MAX_INLINE,
    hash_file_name,
    read_hash_file,
    shard_list,
    take_hash_files,
    write_hash_file,
)
from mmcl.core.card.shard_names import expand
from mmcl.data.parallel import ParallelMap
from mmcl.data.remote.file_lock import file_lock
from mmcl.data.remote.location import sha256_of

Sample = Mapping[str, Any]
"""`{"__key__": "digits-0001", "png": bytes, "cls": b"3", "txt": "three"}`."""

Progress = Callable[[int, int], None]
"""Progress callback, called with (samples done, samples in all)."""

CardTexts = Callable[[Mapping[str, str]], Mapping[str, str]]
"""From {shard: sha256} to {card file name: its text}."""


@dataclass(frozen=True)
class ShardPlan:
    """Plan of one shard.

    Args:
        name: file name, ending in ``.tar``, without a folder.
        count: number of samples, at least 1.
        samples: returns the samples, the same ones in the same order at every call.
    """

    name: str
    count: int
    samples: Callable[[], Iterable[Sample]]


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[int, str]:
    """Write one tar shard atomically, with bytes that depend on the samples alone.

    Members have no time, user or group; inside a sample they are sorted by extension.

    Args:
        path: of the shard.
        samples: each a ``__key__`` and members as bytes or UTF-8 text, named by their extension.

    Returns:
        The number of samples, and the sha256 of the file in hex.

    Raises:
        ValueError: if a key is repeated, or contains a dot, which starts the extension.
    """
    keys: set[str] = set()

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for sample in samples:
                _expect_new_key(path, sample["__key__"], keys)
                texts = {k: v.encode() for k, v in sample.items() if isinstance(v, str)}
                tar.write({**sample, **texts, "__key__": sample["__key__"]})

    write_atomic(path, write)
    return len(keys), sha256_of(path)


def _expect_new_key(path: Path, key: str, keys: set[str]) -> None:
    if "." in key:
        raise ValueError(
            f"sample key {key!r} of {path.name} contains a dot: use letters, digits and -"
        )
    if key in keys:
        raise ValueError(f"sample key {key!r} is twice in {path.name}: give every sample its own")
    keys.add(key)


def build_stream(
    folder: Path,
    name: str,
    plans: Sequence[ShardPlan],
    cards: Sequence[str],
    card_texts: CardTexts,
    *,
    recipe: Mapping[str, Any],
    progress: Progress | None = None,
    parallel_map: ParallelMap = map,
) -> list[Path]:
    """Write the shards that are missing or damaged, then the missing cards.

    An existing card is not changed, so tasks that were appended to it are kept.

    Args:
        folder: of all files, created if missing.
        name: of the stream.
        plans: the shards, with unique names.
        cards: file names of the cards.
        card_texts: returns the cards' texts from the shards' hashes.
        recipe: everything that the bytes depend on, as JSON values: seed, sizes, versions.
            Shards and cards of another recipe with this name are removed first.
        progress: called after every sample, with worker processes after every shard; finished
            shards count at once.
        parallel_map: ``map``, or one over processes, for which plans have to be picklable.

    Returns:
        The paths of the cards, in the order of ``cards``.

    Raises:
        RuntimeError: if a plan yields another number of samples than its ``count``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder):
        record_path = folder / f"{name}.build.json"
        record = _open_record(record_path, cards, json.loads(json.dumps(recipe)))
        for file in (*cards, *(plan.name for plan in plans), record_path.name):
            for leftover in folder.glob(f".{file}.*.tmp"):  # of a killed process
                leftover.unlink(missing_ok=True)
        _write_shards(folder, plans, record_path, record, progress, parallel_map)
        texts = card_texts({plan.name: record["shards"][plan.name] for plan in plans})
        for card in cards:
            if not (folder / card).exists():
                write_atomic(folder / card, texts[card])
    return [folder / card for card in cards]


def _write_shards(
    folder: Path,
    plans: Sequence[ShardPlan],
    record_path: Path,
    record: dict[str, Any],
    progress: Progress | None,
    parallel_map: ParallelMap,
) -> None:
    """Write the missing shards, and add each to the build record when it is complete."""
    hashes, done, total = record["shards"], 0, sum(plan.count for plan in plans)

    def report(number: int) -> None:
        if progress is not None:
            progress(done + number, total)

    # A worker process cannot report its progress inside a shard.
    watch = report if parallel_map is map else None
    is_saved = True
    work = ((folder, plan, hashes.get(plan.name), watch) for plan in plans)
    for number, (plan, sha256) in enumerate(
        zip(plans, parallel_map(_write_one, work), strict=True), start=1
    ):
        if hashes.get(plan.name) != sha256:
            hashes[plan.name], is_saved = sha256, False
        # With many shards the record is long, so it is not saved after each one: after a kill,
        # up to one percent of the shards have to be written again.
        if not is_saved and (number == len(plans) or number % max(1, number // 100) == 0):
            _save_record(record_path, record)
            is_saved = True
        done += plan.count
        report(0)


def _write_one(work: tuple[Path, ShardPlan, str | None, Callable[[int], None] | None]) -> str:
    """Write a shard unless it exists with its recorded hash; return its sha256."""
    folder, plan, recorded, report = work
    path = folder / plan.name
    if recorded is not None and path.is_file() and sha256_of(path) == recorded:
        return recorded

    def counted() -> Iterator[Sample]:
        for number, sample in enumerate(plan.samples(), start=1):
            yield sample
            if report is not None:
                report(number)

    count, sha256 = write_shard(path, counted())
    if count != plan.count:
        path.unlink()
        raise RuntimeError(
            f"shard {plan.name} got {count} samples and its plan says {plan.count}: "
            f"correct the count in the builder"
        )
    return sha256


def _open_record(path: Path, cards: Sequence[str], recipe: Any) -> dict[str, Any]:
    """Return the build record of this recipe, after removing the files of another recipe."""
    old = _read_record(path)
    if old is not None and old.get("recipe") == recipe and old["cards"] == list(cards):
        return old
    # Cards are removed first and the old record last: after a kill in between, the next call
    # repeats the removal.
    for name in (*(old or {}).get("cards", ()), *(old or {}).get("shards", ()), *cards):
        if Path(name).name == name and name.endswith((".tar", ".yaml")):
            (path.parent / name).unlink(missing_ok=True)
    record: dict[str, Any] = {"recipe": recipe, "cards": list(cards), "shards": {}}
    _save_record(path, record)
    return record


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    is_valid = (
        isinstance(record, dict)
        and isinstance(record.get("cards"), list)
        and isinstance(record.get("shards"), dict)
        and all(isinstance(name, str) for name in record["cards"])
    )
    return record if is_valid else None


def _save_record(path: Path, record: Mapping[str, Any]) -> None:
    # Sorted, because a shard that was written again would otherwise come last.
    write_atomic(path, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def card_text(card: Mapping[str, Any], header: Sequence[str]) -> str:
    """Return the YAML text of a card, its fields in order, below a header of comment lines."""
    comments = "".join(f"# {line}\n" for line in header)
    return comments + yaml.dump(
        dict(card), Dumper=_CardDumper, sort_keys=False, allow_unicode=True, width=100
    )


def card_task(
    name: str, train: Sequence[ShardPlan], test: Sequence[ShardPlan], **fields: Any
) -> dict[str, Any]:
    """Return the card entry of a task, with sizes summed over its training and test shards.

    ``fields`` are other keys of the entry, such as ``classes`` or ``text_field``.
    """
    return {
        "name": name,
        **fields,
        "train": shard_list([plan.name for plan in train]),
        "test": shard_list([plan.name for plan in test]),
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
    return {**content, **take_hash_files(content, path.parent, CardErrors())}


def listed_shards(path: Path, shards: Collection[str]) -> list[str]:
    """Return those of some shards of a folder that a YAML file of it lists, as far as it is a card.

    Of a file that is none, or has errors, those whose names occur in its text.
    """
    names: set[str] = set()
    try:
        card, errors = validate_card(path)
    except ValueError:
        errors = ["no card"]
    else:
        for entry in (*card.tasks, *card.eval_only):
            names.update((*entry.train, *entry.test))
        names.update(shard for source in card.sources.values() for shard in source.shards)
    places = {os.path.realpath(path.parent / name) for name in names}
    text = path.read_text(encoding="utf-8", errors="replace") if errors else ""
    return [s for s in shards if os.path.realpath(path.parent / s) in places or s in text]


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

    Lines of ``header`` are added at the top, unless they are there already.

    Raises:
        ValueError: if the card would have errors; the old one is kept.
    """
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    above: list[str] = []
    for line in old.splitlines():
        if not line.startswith("#"):
            break
        above.append(line.removeprefix("#").strip())
    content, hashes, counts = _without_hashes(hash_file_name(path), content, old)
    hash_file = path.with_name(hash_file_name(path))
    text = card_text(content, [*above, *(line for line in header if line not in above)])
    if hashes or counts:
        # Until the new card is there, the file also states what the old card lists.
        before = read_hash_file(hash_file) if hash_file.is_file() else ({}, {})
        write_hash_file(hash_file, {**before[0], **hashes}, {**before[1], **counts})
    if text != old:
        write_atomic(path, lambda temporary: _checked(temporary, text))
    if hashes or counts:
        write_hash_file(hash_file, hashes, counts)


def _without_hashes(
    name: str, content: Mapping[str, Any], old: str
) -> tuple[Mapping[str, Any], dict[str, str], dict[str, int]]:
    """Return a card's content, and what goes into its hash file, nothing if the card has them.

    A card whose ``old`` text names the file keeps it.
    """
    hashes, counts = dict(content.get("hashes") or {}), dict(content.get("counts") or {})
    if max(len(hashes), len(counts)) <= MAX_INLINE and name not in old:
        return content, {}, {}
    rest = {key: value for key, value in content.items() if key not in ("hashes", "counts")}
    return {**rest, "hashes": name}, hashes, counts


def _checked(temporary: Path, text: str) -> None:
    temporary.write_text(text, encoding="utf-8")
    read_card(temporary)


def _shards(entry: Mapping[str, Any]) -> list[str]:
    splits = (entry.get("train", ()), entry.get("test", ()))
    listed = [name for names in splits for name in ([names] if isinstance(names, str) else names)]
    return [shard for name in listed for shard in expand(name)]


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
