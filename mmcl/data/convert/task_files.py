"""Files of converted tasks: plans of their shards, or small files that point at a JSON in place."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmcl.core.atomic_write import write_atomic
from mmcl.data.convert.record import Chunk, ConvertOptions, Record
from mmcl.data.convert.task_split import SplitSamples, TaskSplits, shard_slices
from mmcl.data.remote.location import default_cache, sha256_of
from mmcl.data.shards.json_index import open_json_index
from mmcl.data.shards.json_shard import FORMAT, SUFFIX, sample_key
from mmcl.data.shards.stream_writer import Sample, ShardPlan, card_task
from mmcl.data.stored_sample import IntArray


@dataclass(frozen=True)
class _ShardChunk:
    """Records of one shard from one chunk, (k,) numbers in their input and (k,) class ids."""

    records: Chunk
    numbers: IntArray
    labels: IntArray | None


def unique_names(names: Sequence[str]) -> list[str]:
    """Return a unique prefix of file names and keys for each task."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60].strip("-") or "task"
        stem, number = plain, 2
        while stem in found:
            stem, number = f"{plain}-{number}", number + 1
        found.append(stem)
    return found


def plan_task(
    stem: str, task: TaskSplits, options: ConvertOptions
) -> tuple[dict[str, Any], list[ShardPlan]]:
    """Return the card entry of a task, and the plans of its shards."""
    train = _plans(f"{stem}-train", task.train, options, bool(task.classes))
    test = _plans(f"{stem}-test", task.test, options, bool(task.classes))
    fields = {"classes": list(task.classes)} if task.classes else {}
    return card_task(task.name, train, test, **fields), [*train, *test]


def _plans(
    stem: str, hand: SplitSamples, options: ConvertOptions, has_labels: bool
) -> list[ShardPlan]:
    inputs = hand.scan.source.chunks
    ends = np.cumsum([len(chunk) for chunk in inputs])
    sizes = hand.scan.size[hand.numbers]
    plans = []
    for number, own in enumerate(shard_slices(sizes, options.shard_samples, options.shard_bytes)):
        order = own.start + np.argsort(hand.numbers[own], kind="stable")
        numbers = hand.numbers[order]
        labels = hand.labels[order] if has_labels else None
        samples = _Samples(stem, inputs, ends, numbers, labels)
        plans.append(ShardPlan(f"{stem}-{number:05d}.tar", len(numbers), samples))
    return plans


@dataclass(frozen=True)
class _Samples:
    """Samples of one shard; pickled as only the chunks that the shard needs."""

    stem: str
    inputs: Sequence[Chunk]
    ends: IntArray
    numbers: IntArray
    labels: IntArray | None

    def __call__(self) -> Iterator[Sample]:
        return _samples(self.stem, self.chunks())

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_samples, self.stem, list(self.chunks()))

    def chunks(self) -> Iterator[_ShardChunk]:
        which = np.searchsorted(self.ends, self.numbers, side="right")
        bounds = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(which)]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            number = int(which[first])
            chunk = self.inputs[number]
            own = self.numbers[first:last]
            indices = own - (int(self.ends[number]) - len(chunk))
            labels = None if self.labels is None else self.labels[first:last]
            yield _ShardChunk(chunk.subset(indices), own, labels)


def _samples(stem: str, chunks: Iterable[_ShardChunk]) -> Iterator[Sample]:
    for chunk in chunks:
        for index, record in enumerate(chunk.records.read()):
            if not isinstance(record, Record):
                raise RuntimeError(
                    f"{record.name or 'a sample'} changed while the stream was written "
                    f"({record.reason}): run the same command again"
                )
            key = sample_key(stem, int(chunk.numbers[index]), record.name)
            label = {} if chunk.labels is None else {"cls": str(int(chunk.labels[index]))}
            yield {"__key__": key, **record.members, **label}


@dataclass(frozen=True)
class InPlace:
    """Image folders of samples in place, and the key of answers in records with ``text``.

    ``follow_links`` says whether links in the folders may lead outside of them.
    """

    images: Path
    test_images: Path
    answer_field: str = "answer"
    follow_links: bool = False


def write_in_place(
    folder: Path, tasks: Sequence[TaskSplits], in_place: InPlace
) -> tuple[list[dict[str, Any]], dict[str, str], dict[str, int]]:
    """Write ``<task>-train.loose.json`` and ``<task>-test.loose.json`` for tasks of LLaVA's JSON.

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
            _write(path, f"{stem}-{split}", hand, images, in_place)
            hashes[path.name], counts[path.name] = sha256_of(path), len(hand.numbers)
            entry[split] = [path.name]
        sizes = {"size": len(task.train.numbers), "test_size": len(task.test.numbers)}
        entries.append({**entry, **sizes})
    return entries, hashes, counts


def _write(path: Path, stem: str, hand: SplitSamples, images: Path, in_place: InPlace) -> None:
    answer_field = in_place.answer_field
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
    if in_place.follow_links:
        content["follow_links"] = True
    chosen = path.with_name(f"{stem}.indices.npy")
    if len(hand.numbers) < len(index.records):
        content["indices"] = chosen.name
        buffer = io.BytesIO()
        np.save(buffer, hand.numbers.astype(np.int64))
        write_atomic(chosen, buffer.getvalue())
    else:
        chosen.unlink(missing_ok=True)
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _relative(folder: Path, path: Path) -> str:
    """Return an absolute path as it is, another relative to ``folder``."""
    return str(path) if path.is_absolute() else os.path.relpath(path, folder)
