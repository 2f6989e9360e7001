"""Shard writer that resumes after a kill at any moment and ends with the same bytes.

A builder lists what it will write as `ShardPlan`, and `build_stream` writes the shards, each to a
temporary name that is renamed when it is complete, then the cards. Next to them it keeps
`<stream>.build.json`, the recipe of the build and the hash of every finished shard: shards that
match are not written again, and a folder made by another recipe is written from scratch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from mmcl.core.atomic_write import write_atomic
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
                tar.write({name: _to_bytes(name, value) for name, value in sample.items()})

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


def _to_bytes(name: str, value: str | bytes) -> str | bytes:
    return value.encode() if isinstance(value, str) and name != "__key__" else value


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
            _remove_leftovers(folder, file)
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


def _write_one(
    work: tuple[Path, ShardPlan, str | None, Callable[[int], None] | None],
) -> str:
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


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove temporary files of `write_atomic` that a killed process left."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)
