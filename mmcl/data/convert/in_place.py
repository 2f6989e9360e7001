"""In-place conversion: small files that point at a JSON file and its images."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.core.atomic_write import write_atomic
from mmcl.data.convert.task_shards import unique_names
from mmcl.data.convert.task_split import SplitSamples, TaskSplits
from mmcl.data.remote.location import default_cache, sha256_of
from mmcl.data.shards.json_index import open_json_index
from mmcl.data.shards.json_shard import FORMAT, SUFFIX


@dataclass(frozen=True)
class InPlace:
    """Location of samples that are used in place.

    Args:
        images: folder of the images.
        test_images: folder of the images of the test file, if there is one.
        answer_field: key of the right answer in records with ``text``.
    """

    images: Path
    test_images: Path
    answer_field: str = "answer"


def write_in_place(
    folder: Path, tasks: Sequence[TaskSplits], in_place: InPlace
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]:
    """Write ``<task>-train.loose.json`` and ``<task>-test.loose.json`` for every task.

    Args:
        folder: of the files, created if missing.
        tasks: from instruction files.
        in_place: where the images are.

    Returns:
        Card entry of each task, and hash and number of samples of each file by its name.
    """
    entries: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    counts: dict[str, int] = {}
    for stem, task in zip(unique_names([task.name for task in tasks]), tasks, strict=True):
        entry: dict[str, Any] = {"name": task.name}
        for split, hand, images in (
            ("train", task.train, in_place.images),
            ("test", task.test, in_place.images if task.test.scan is task.train.scan
             else in_place.test_images),
        ):  # fmt: skip
            path = folder / f"{stem}-{split}{SUFFIX}"
            _write(path, f"{stem}-{split}", hand, images, in_place.answer_field)
            hashes[path.name], counts[path.name] = sha256_of(path), len(hand.numbers)
            entry[split] = [path.name]
        sizes = {"size": len(task.train.numbers), "test_size": len(task.test.numbers)}
        entries.append({**entry, **sizes})
    return entries, hashes, counts


def _write(path: Path, stem: str, hand: SplitSamples, images: Path, answer_field: str) -> None:
    records = Path(hand.scan.source.where)
    # The index is written now, next to the JSON if possible, so that the first run starts at once.
    index = open_json_index(records, answer_field, default_cache())
    content: dict[str, Any] = {
        "format": FORMAT,
        "records": _relative(path.parent, records),
        "images": _relative(path.parent, images),
        "samples": len(hand.numbers),
        "bytes": index.records.size,
        "sha256": index.sha256,
        "keys": stem,
    }
    if answer_field != "answer":
        content["answer_field"] = answer_field
    chosen = path.with_name(f"{stem}.places.npy")
    if len(hand.numbers) < len(index.records):
        content["places"] = chosen.name
        buffer = io.BytesIO()
        np.save(buffer, hand.numbers.astype(np.int64))
        write_atomic(chosen, buffer.getvalue())
    else:
        chosen.unlink(missing_ok=True)
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _relative(folder: Path, path: Path) -> str:
    """Return an absolute path as it is, another relative to ``folder``."""
    return str(path) if path.is_absolute() else os.path.relpath(path, folder)
