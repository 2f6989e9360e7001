"""A task that stays where it lies: small files that point at a JSON and its pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.core.atomic import write_atomic
from mmcl.data.making.dealing import DealtTask, Hand
from mmcl.data.making.shards import stems
from mmcl.data.shards.loose import FORMAT, SUFFIX
from mmcl.data.shards.loose_index import open_loose_index
from mmcl.data.source import default_cache, sha256_of


@dataclass(frozen=True)
class Loose:
    """Where samples lie that are used in place.

    Args:
        images: folder of the pictures.
        test_images: of those of the test file, if there is one.
    """

    images: Path
    test_images: Path


def write_loose(
    folder: Path, tasks: Sequence[DealtTask], loose: Loose
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]:
    """Write ``<task>-train.loose.json`` and ``<task>-test.loose.json`` for every task.

    Args:
        folder: where they will lie, made if need be.
        tasks: from instruction files.
        loose: where the pictures are.

    Returns:
        what a card says of each task, and hashes and samples of the files by their names.
    """
    entries: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for stem, task in zip(stems([task.name for task in tasks]), tasks, strict=True):
        entry: dict[str, Any] = {"name": task.name}
        for part, hand, images in (
            ("train", task.train, loose.images),
            ("test", task.test, loose.images if task.test.looked is task.train.looked
             else loose.test_images),
        ):  # fmt: skip
            path = folder / f"{stem}-{part}{SUFFIX}"
            _write(path, f"{stem}-{part}", hand, images)
            hashes[path.name], counts[path.name] = sha256_of(path), len(hand.numbers)
            entry[part] = [path.name]
        sizes = {"size": len(task.train.numbers), "test_size": len(task.test.numbers)}
        entries.append({**entry, **sizes})
    return entries, hashes, counts


def _write(path: Path, stem: str, hand: Hand, images: Path) -> None:
    records = Path(hand.looked.source.where)
    # Made now, beside the JSON if that can be written to, so that the first run starts at once.
    index = open_loose_index(records, "answer", default_cache())
    stated: dict[str, Any] = {
        "format": FORMAT,
        "records": _seen_from(path.parent, records),
        "images": _seen_from(path.parent, images),
        "samples": len(hand.numbers),
        "bytes": index.records.size,
        "sha256": index.sha256,
        "keys": stem,
    }
    chosen = path.with_name(f"{stem}.places.npy")
    if len(hand.numbers) < len(index.records):
        stated["places"] = chosen.name
        held = io.BytesIO()
        np.save(held, hand.numbers.astype(np.int64))
        write_atomic(chosen, held.getvalue())
    else:
        chosen.unlink(missing_ok=True)
    write_atomic(path, json.dumps(stated, indent=1, ensure_ascii=False) + "\n")


def _seen_from(folder: Path, path: Path) -> str:
    """Return a path as it was given: absolute, or relative to where it is written down."""
    return str(path) if path.is_absolute() else os.path.relpath(path, folder)
