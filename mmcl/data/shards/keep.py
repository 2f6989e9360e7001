"""Copies of recalled samples: ordinary shards, for users who must let the old data go.

A copy is named after its number inside its task and carries its old key as text, so training from
copies is bitwise training from references. Beside each shard lies a small JSON with its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset.writer import TarWriter

from mmcl.core import Recall, TaskStream, write_atomic
from mmcl.data.faults import BadSample
from mmcl.data.prepare import PreparedStream
from mmcl.data.reader import SampleReader, shown
from mmcl.data.shard import Numbers, Sample
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.source import LocalOrigin, is_remote, sha256_of

_KEY = "mmcl-key.txt"
"""Member of a copy that holds the key of the original."""


class CopiesReader:
    """Reads kept copies of one task by the numbers that the originals had.

    Picklable, as ``Reader`` is.

    Args:
        folder: where the copies lie.
        task: index of the task.

    Raises:
        FileNotFoundError: if there are no copies of this task.
        ValueError: if they are not what was written.
    """

    def __init__(self, folder: Path, task: int) -> None:
        path = _shard(folder, task)
        if not path.is_file() or not _note(path).is_file():
            raise FileNotFoundError(
                f"there are no kept copies of task {task} ({path}): keep_copies writes them when "
                "the task ends, from its shards"
            )
        stated = _stated(path)
        own = sha256_of(path)
        if own != stated.get("sha256"):
            raise ValueError(
                f"the kept copies {path} have the sha256 {own} and their note says "
                f"{stated.get('sha256')}: they were damaged or half replaced; restore them or "
                "write them anew from the task's shards"
            )
        self._copies = TarShard(LocalOrigin(path), path.name, cache=None)
        keys = map(self._copies.key, range(len(self._copies)))
        self._numbers = np.fromiter(map(_number, keys), dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of copies."""
        return len(self._numbers)

    @property
    def numbers(self) -> Numbers:
        """The original numbers of the copies, rising."""
        return self._numbers

    def read(self, number: int) -> Sample:
        """Return the copy of a sample, under the key of the original."""
        sample = self._copies.read(self._place(number))
        own = {name: data for name, data in sample.members.items() if name != _KEY}
        return replace(sample, key=_original(sample), members=own)

    def key(self, number: int) -> str:
        """Return the key of the original."""
        return _original(self._copies.read(self._place(number)))

    def where(self, number: int) -> str:
        """Name a sample for a person: ``<key> in <shard>``."""
        return f"{shown(self.key(number))} in {self._copies.name}"

    def holds(self, numbers: Numbers) -> np.ndarray:
        """Tell for (R,) sample numbers whether each was copied: (R,) bool."""
        return np.isin(numbers, self._numbers)

    def lengths(self, member: str, numbers: Numbers | None = None) -> Numbers:
        """Return (R,) bytes of a text member of the numbered copies, None = of all of them."""
        lengths = self._copies.lengths(member)
        return lengths if numbers is None else lengths[np.searchsorted(self._numbers, numbers)]

    def _place(self, number: int) -> int:
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            raise IndexError(f"sample {number} was not copied to {self._copies.origin.url}")
        return place


def keep_copies(prepared: PreparedStream, recall: Recall, folder: Path, task: int) -> None:
    """Copy the recalled samples of a task into ``task_{task:03d}.tar``, byte for byte.

    Copies that are already there and hold every asked sample are left alone, so a memory that
    shrinks loses nothing until ``prune_copies`` is called, and a killed call is simply repeated.

    Args:
        prepared: the stream, with the shards of this task.
        recall: what is remembered; samples of other tasks are passed over.
        folder: for the copies, usually the run's ``memory/``.
        task: index of the task.
    """
    wanted = _wanted(recall, task)
    kept = _kept(folder, task)
    if kept is not None and kept.holds(wanted).all():
        return
    _write(_shard(folder, task), prepared.reader(task, "train"), wanted.tolist())


def prune_copies(recall: Recall, folder: Path, task: int) -> None:
    """Drop the copies of a task that are remembered no longer; call when no checkpoint needs them.

    Args:
        recall: what is remembered now.
        folder: of the copies.
        task: index of the task.
    """
    kept, wanted = CopiesReader(folder, task), _wanted(recall, task)
    if len(wanted) < len(kept):
        _write(_shard(folder, task), kept, wanted.tolist())


def given_up(stream: TaskStream, folder: Path) -> list[int]:
    """Return the tasks whose old samples were copied and whose training shards are gone."""
    copied = [task.index for task in stream if _shard(folder, task.index).exists()]
    return [
        index
        for index in copied
        if not all(
            is_remote(stream.shard(name)) or Path(stream.shard(name)).exists()
            for name in stream[index].train
        )
    ]


def _wanted(recall: Recall, task: int) -> Numbers:
    wanted: Numbers = torch.unique(recall.sample[recall.task == task]).cpu().numpy()
    return wanted


def _kept(folder: Path, task: int) -> CopiesReader | None:
    try:
        return CopiesReader(folder, task)
    except (OSError, ValueError):
        return None


def _write(path: Path, reader: SampleReader, numbers: Sequence[int]) -> None:

    def write(temporary: Path) -> None:
        with (
            temporary.open("wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as tar,
        ):
            for number in numbers:
                try:
                    sample = reader.read(number)
                    own = {_KEY: sample.key.encode(), **sample.members}
                except BadSample:
                    # A copy without members is bad as well, so the same stand-in is met.
                    own = {_KEY: reader.key(number).encode()}
                tar.write({"__key__": f"{number:09d}", **own})

    write_atomic(path, write)
    note = {"sha256": sha256_of(path), "samples": len(numbers), "bytes": path.stat().st_size}
    write_atomic(_note(path), json.dumps(note, indent=1) + "\n")


def _shard(folder: Path, task: int) -> Path:
    return folder / f"task_{task:03d}.tar"


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _stated(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        note = None
    return note if isinstance(note, dict) else {}


def _original(copy: Sample) -> str:
    """Return the key that a copy carries, or its own where it carries none."""
    return copy.members.get(_KEY, copy.key.encode()).decode("utf-8", "backslashreplace")


def _number(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 18):
        raise ValueError(
            f"the copy {key[:80]!r} is not named by a number: keep_copies did not write it"
        )
    return int(key)
