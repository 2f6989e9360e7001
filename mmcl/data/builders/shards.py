"""Writing shards so that a build may be killed at any moment and still ends the same to the byte.

A builder says what it will write as a list of `ShardPlan`, and `build_stream` does the rest: shards
first, each to a temporary name that is renamed when it is whole, then the cards. Beside them lies
`<stream>.build.json`, the recipe of the build and the hash of every finished shard: what is there
and true is not made again, and a folder made by another recipe is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from mmcl.core.atomic import write_atomic
from mmcl.data.lock import exclusive
from mmcl.data.making.processes import Spread
from mmcl.data.source import sha256_of

Sample = Mapping[str, Any]
"""`{"__key__": "digits-0001", "png": bytes, "cls": b"3", "txt": "three"}`."""

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all)."""

CardTexts = Callable[[Mapping[str, str]], Mapping[str, str]]
"""From {shard: sha256} to {card file name: its text}."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard before it is written.

    Args:
        name: file name, ending in ``.tar``, without a folder.
        count: samples that ``samples`` will give, at least 1.
        samples: makes the samples, the same ones in the same order at every call.
    """

    name: str
    count: int
    samples: Callable[[], Iterable[Sample]]


def write_shard(path: Path, samples: Iterable[Sample]) -> tuple[int, str]:
    """Write one tar shard, whole or not at all, with bytes that depend on the samples alone.

    Members carry no time, user or group; inside a sample they are sorted by extension.

    Args:
        path: where the shard will stand.
        samples: each a ``__key__`` and members as bytes or UTF-8 text, named by their extension.

    Returns:
        The number of samples, and the sha256 of the file in hex.

    Raises:
        ValueError: if a key is repeated, or holds a dot and so would run into its extension.
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
            f"sample key {key!r} of {path.name} holds a dot: use letters, digits and -"
        )
    if key in keys:
        raise ValueError(
            f"sample key {key!r} comes twice in {path.name}: give every sample its own"
        )
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
    spread: Spread = map,
) -> list[Path]:
    """Make the shards that are missing or not as they were written, then the missing cards.

    A card that is there stays as it is, so tasks that somebody appended to it are kept.

    Args:
        folder: where everything will lie; made if need be.
        name: of the stream.
        plans: the shards, no two of one name.
        cards: file names of the cards.
        card_texts: makes the cards' texts from the shards' hashes.
        recipe: everything that the bytes depend on, as JSON values: seed, sizes, versions.
            Shards and cards of another recipe with this name are removed first.
        progress: told after every sample, over processes after every shard; finished shards
            count at once.
        spread: ``map``, or one over processes, for which plans have to be picklable.

    Returns:
        The paths of the cards, in the order of ``cards``.

    Raises:
        RuntimeError: if a plan gives another number of samples than it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        record_path = folder / f"{name}.build.json"
        record = _open_record(record_path, cards, json.loads(json.dumps(recipe)))
        for file in (*cards, *(plan.name for plan in plans), record_path.name):
            _remove_leftovers(folder, file)
        _make_shards(folder, plans, record_path, record, progress, spread)
        texts = card_texts({plan.name: record["shards"][plan.name] for plan in plans})
        for card in cards:
            if not (folder / card).exists():
                write_atomic(folder / card, texts[card])
    return [folder / card for card in cards]


def _make_shards(
    folder: Path,
    plans: Sequence[ShardPlan],
    record_path: Path,
    record: dict[str, Any],
    progress: Progress | None,
    spread: Spread,
) -> None:
    """Write what is missing, and note every shard in the record when it is whole."""
    made, done, total = record["shards"], 0, sum(plan.count for plan in plans)

    def told(number: int) -> None:
        if progress is not None:
            progress(done + number, total)

    # A process of its own cannot tell how far it is inside of a shard.
    watch = told if spread is map else None
    is_saved = True
    work = ((folder, plan, made.get(plan.name), watch) for plan in plans)
    for number, (plan, sha256) in enumerate(
        zip(plans, spread(_make_shard, work), strict=True), start=1
    ):
        if made.get(plan.name) != sha256:
            made[plan.name], is_saved = sha256, False
        # With many shards the record is long, so it is not written after each: of a thousand that
        # were made, ten may have to be made again.
        if not is_saved and (number == len(plans) or number % max(1, number // 100) == 0):
            _save_record(record_path, record)
            is_saved = True
        done += plan.count
        told(0)


def _make_shard(
    work: tuple[Path, ShardPlan, str | None, Callable[[int], None] | None],
) -> str:
    """Write a shard unless it is there as it was written; return its sha256."""
    folder, plan, stated, told = work
    path = folder / plan.name
    if stated is not None and path.is_file() and sha256_of(path) == stated:
        return stated

    def counted() -> Iterator[Sample]:
        for number, sample in enumerate(plan.samples(), start=1):
            yield sample
            if told is not None:
                told(number)

    count, sha256 = write_shard(path, counted())
    if count != plan.count:
        path.unlink()
        raise RuntimeError(
            f"shard {plan.name} got {count} samples where its plan says {plan.count}: "
            f"correct the count in the builder"
        )
    return sha256


def _open_record(path: Path, cards: Sequence[str], recipe: Any) -> dict[str, Any]:
    """Return the record of this recipe; the files of another one are removed before it starts."""
    old = _read_record(path)
    if old is not None and old.get("recipe") == recipe and old["cards"] == list(cards):
        return old
    # Cards go first and the old record last: killed in between, the next call does the same again.
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
    is_whole = (
        isinstance(record, dict)
        and isinstance(record.get("cards"), list)
        and isinstance(record.get("shards"), dict)
        and all(isinstance(name, str) for name in record["cards"])
    )
    return record if is_whole else None


def _save_record(path: Path, record: Mapping[str, Any]) -> None:
    # Sorted, because a shard that was repaired would otherwise stand last.
    write_atomic(path, json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed process left of a file under the temporary names of `write_atomic`."""
    for leftover in folder.glob(f".{name}.*.tmp"):
        leftover.unlink(missing_ok=True)
