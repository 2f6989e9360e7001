"""Copies of replay samples in ordinary shards, for users who must delete the old data.

A copy is named after its number in its task and holds its original key as text, so training from
copies equals training from references bit for bit. Next to each shard is a JSON with its sha256.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmcl.core import ReplayPlan, TaskStream, write_atomic
from mmcl.core.card.schema import escape_unprintable
from mmcl.data.remote.location import LocalFile, is_remote, sha256_of
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import SampleReader
from mmcl.data.shards.stream_writer import write_shard
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadSample, IntArray, Sample

_KEY = "mmcl-key.txt"
"""Extension of the member that holds the key of the original."""


class ReplayCopyReader:
    """Reader of the replay copies of one task, by the numbers of the originals.

    Picklable, as ``Reader`` is.

    Args:
        folder: folder of the copies.
        task: index of the task.

    Attributes:
        numbers: (n,) numbers of the originals, increasing.

    Raises:
        FileNotFoundError: if there are no copies of this task.
        ValueError: if they differ from what was written.
    """

    def __init__(self, folder: Path, task: int) -> None:
        path = _shard(folder, task)
        if not path.is_file() or not _note_path(path).is_file():
            raise FileNotFoundError(
                f"there are no kept copies of task {task} ({path}): save_replay_copies writes them "
                "when the task ends, from its shards"
            )
        try:
            stated = json.loads(_note_path(path).read_text(encoding="utf-8"))["sha256"]
        except (ValueError, RecursionError, KeyError, TypeError):
            stated = None
        actual = sha256_of(path)
        if actual != stated:
            raise ValueError(
                f"the kept copies {path} have the sha256 {actual} and their note says "
                f"{stated}: they were damaged or half replaced; restore them or write them again "
                "from the task's shards"
            )
        self._copies = TarShard(LocalFile(path), path.name, cache=None)
        keys = map(self._copies.key, range(len(self._copies)))
        self.numbers = np.fromiter(map(_number, keys), dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of copies."""
        return len(self.numbers)

    def read(self, number: int) -> Sample:
        """Return the copy of a sample, under the key of the original."""
        sample = self._copies.read(self._index(number))
        members = {name: data for name, data in sample.members.items() if name != _KEY}
        return replace(sample, key=_original_key(sample), members=members)

    def key(self, number: int) -> str:
        """Return the key of the original."""
        return _original_key(self._copies.read(self._index(number)))

    def describe(self, number: int) -> str:
        """Describe a sample in a message: ``<key> in <shard>``."""
        return f"{escape_unprintable(self.key(number))} in {self._copies.name}"

    def contains(self, numbers: IntArray) -> np.ndarray:
        """Return (R,) bool: whether each of the (R,) sample numbers was copied."""
        return np.isin(numbers, self.numbers)

    def text_bytes(self, member: str, numbers: IntArray | None = None) -> IntArray:
        """Return (R,) bytes of a text member of the numbered copies, None = of all of them."""
        lengths = self._copies.text_bytes(member)
        return lengths if numbers is None else lengths[np.searchsorted(self.numbers, numbers)]

    @property
    def is_remote(self) -> bool:
        """Whether copies may have to be fetched: never."""
        return False

    def image_heads(self, number: int, limit: int | None) -> list[bytes]:
        """Return the first ``limit`` bytes of each image of a copy, None = all of them."""
        return self._copies.image_heads(self._index(number), limit)

    def _index(self, number: int) -> int:
        index = int(np.searchsorted(self.numbers, number))
        if index == len(self.numbers) or self.numbers[index] != number:
            raise IndexError(f"sample {number} was not copied to {self._copies.origin.url}")
        return index


def save_replay_copies(
    prepared: OpenStream, replay_plan: ReplayPlan, folder: Path, task: int
) -> None:
    """Copy the replay samples of a task into ``task_{task:03d}.tar``, byte for byte.

    Copies that are already there and hold every wanted sample are left alone, so a buffer that
    shrinks loses nothing until ``prune_replay_copies`` is called, and a killed call can be
    repeated.

    Args:
        prepared: the stream, with the shards of this task.
        replay_plan: samples in the buffer; those of other tasks are ignored.
        folder: folder of the copies, usually the run's ``memory/``.
        task: index of the task.
    """
    wanted = _wanted(replay_plan, task)
    with contextlib.suppress(OSError, ValueError):
        if ReplayCopyReader(folder, task).contains(wanted).all():
            return
    _write(_shard(folder, task), prepared.reader(task, "train"), wanted.tolist())


def prune_replay_copies(replay_plan: ReplayPlan, folder: Path, task: int) -> None:
    """Delete copies that the buffer no longer holds; call when no checkpoint needs them.

    Args:
        replay_plan: samples in the buffer now.
        folder: folder of the copies.
        task: index of the task.
    """
    kept, wanted = ReplayCopyReader(folder, task), _wanted(replay_plan, task)
    if len(wanted) < len(kept):
        _write(_shard(folder, task), kept, wanted.tolist())


def released_tasks(stream: TaskStream, folder: Path) -> list[int]:
    """Return the tasks whose samples were copied and whose training shards are gone."""
    copied = [task.index for task in stream if _shard(folder, task.index).exists()]
    return [
        index
        for index in copied
        if not all(
            is_remote(stream.shard(name)) or Path(stream.shard(name)).exists()
            for name in stream[index].train
        )
    ]


def _wanted(replay_plan: ReplayPlan, task: int) -> IntArray:
    samples = replay_plan.sample_ids[replay_plan.task_ids == task]
    return np.asarray(torch.unique(samples).cpu().numpy(), dtype=np.int64)


def _write(path: Path, reader: SampleReader, numbers: Sequence[int]) -> None:

    def copies() -> Iterator[Mapping[str, Any]]:
        for number in numbers:
            try:
                sample = reader.read(number)
                members = {_KEY: sample.key.encode(), **sample.members}
            except BadSample:
                # A copy without members is bad as well, so it gets the same replacement.
                members = {_KEY: reader.key(number).encode()}
            yield {"__key__": f"{number:09d}", **members}

    count, sha256 = write_shard(path, copies())
    note = {"sha256": sha256, "samples": count, "bytes": path.stat().st_size}
    write_atomic(_note_path(path), json.dumps(note, indent=1) + "\n")


def _shard(folder: Path, task: int) -> Path:
    return folder / f"task_{task:03d}.tar"


def _note_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _original_key(copy: Sample) -> str:
    """Return the original key that a copy holds, or the copy's own key if it holds none."""
    return copy.members.get(_KEY, copy.key.encode()).decode("utf-8", "backslashreplace")


def _number(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 18):
        raise ValueError(
            f"the copy {key[:80]!r} is not named by a number: save_replay_copies did not write it"
        )
    return int(key)
