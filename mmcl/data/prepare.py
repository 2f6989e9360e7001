"""What is checked before a run: shards found, indexed and counted; all faults told at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mmcl.core import Task, TaskStream
from mmcl.data.faults import BadShard, Faults
from mmcl.data.limit import choice, expect_limit, limited
from mmcl.data.reader import Reader, shown
from mmcl.data.row import READ_KINDS
from mmcl.data.shard import Shard
from mmcl.data.shards.index import is_read
from mmcl.data.shards.opening import Place, expect_hash, open_shard
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.source import default_cache, is_remote

Part = Literal["train", "test"]
Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""

EAGER = 1000
"""Shards of a stream up to which all local ones are opened before the run."""

_THREADS = 8


@dataclass(frozen=True)
class PreparedStream:
    """A stream whose shards were found whole.

    Attributes:
        stream: the same stream with exact sizes (after the limit).
        readers: (column, part) -> reader of its samples.
        sources: number of a source that some task mixes in -> reader of its samples.
    """

    stream: TaskStream
    readers: Mapping[tuple[int, Part], Reader]
    sources: Mapping[int, Reader] = field(default_factory=dict)

    def reader(self, column: int, part: Part) -> Reader:
        """Return the reader of one part of a task or probe.

        Raises:
            RuntimeError: if the part belongs to a finished task whose data was given up, or to a
                probe, which has no training part.
        """
        if (column, part) not in self.readers:
            name = self.stream.column(column).name
            raise RuntimeError(
                f"the {part} part of '{name}' is not open to this run: it belongs to a probe or "
                "to a finished task whose data was given up; keep='references' keeps old shards in "
                "use, keep='copies' stores what is recalled"
            )
        return self.readers[column, part]

    def source_reader(self, number: int) -> Reader:
        """Return the reader of a source."""
        return self.sources[number]


def prepare(
    stream: TaskStream,
    *,
    limit: float | int | None = None,
    seed: int = 0,
    allow_pipes: bool = False,
    cache: Path | None = None,
    cache_limit: int | None = None,
    verify_hashes: bool = False,
    finished: Collection[int] = (),
    progress: Progress | None = None,
) -> PreparedStream:
    """Find, index and count all shards of a stream, several at a time.

    A shard whose samples the card counts is opened at its first read, if it is remote or one of
    more than ``EAGER``; what is wrong with it ends the run then.

    Args:
        stream: as its card says.
        limit: 200 = at most 200 samples of every part of every task, 0.02 = that share of them: a
            seeded choice that depends on the task's name alone, in recorded order.
        seed: of the limit's choice.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        cache: folder for remote shards, and for indexes of read-only ones; None = $MMCL_CACHE or
            the user's cache folder.
        cache_limit: bytes that remote shards may take there; None = no limit.
        verify_hashes: read every shard that has a hash on the card and compare.
        finished: tasks whose training shards are not opened; they may be gone.
        progress: told after every shard.

    Returns:
        The stream with exact sizes, and readers of its samples.

    Raises:
        ValueError: one line for every fault of the stream, or a bad limit.
    """
    expect_limit(limit)
    work = _Work(stream, Place(cache or default_cache(), cache_limit, allow_pipes), verify_hashes)
    all_parts: list[tuple[Task, Part]] = [(t, p) for t in stream.columns for p in _parts(t)]
    parts = [(t, p) for t, p in all_parts if p == "test" or t.index not in finished]
    mixed = sorted({number for task in stream.tasks for number, _ in task.mix})
    own = {number: stream.sources[number - 1].rows for number in mixed}
    work.open_all([*parts, *((rows, "train") for rows in own.values())], progress)
    readers = {(task.index, part): work.reader(task, part, limit, seed) for task, part in parts}
    sources = {number: work.reader(rows, "train", limit, seed) for number, rows in own.items()}
    work.faults.raise_all(stream.name)
    return PreparedStream(_counted(stream, readers, limit), readers, sources)


@dataclass
class _Work:
    """What is known while a stream is gone through."""

    stream: TaskStream
    place: Place
    verify_hashes: bool
    faults: Faults = field(default_factory=Faults)
    opened: dict[str, Shard | str] = field(default_factory=dict)

    def open_all(
        self, parts: Sequence[tuple[Task, Part]], progress: Progress | None = None
    ) -> None:
        """Open every shard once; what cannot be opened is remembered as the reason."""
        names = list(dict.fromkeys(n for task, part in parts for n in _shards(task, part)))
        all_of_them = len(names) <= EAGER
        with ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1))) as pool:
            found = pool.map(lambda name: self.open_shard(name, all_of_them), names)
            for done, (name, shard) in enumerate(zip(names, found, strict=True), start=1):
                self.opened[name] = shard
                if progress is not None:
                    progress(done, len(names))

    def open_shard(self, name: str, is_eager: bool) -> Shard | str:
        """Return a shard, or what is wrong with it."""
        try:
            return self.shard_of(name, is_eager)
        except BadShard as fault:
            return str(fault)
        except OSError as error:
            return f"cannot be read ({error})"

    def shard_of(self, name: str, is_eager: bool) -> Shard:
        stated = self.stream.hashes.get(name, "").lower()
        place = replace(self.place, sha256=stated, count=self.stream.counts.get(name))
        url = self.stream.shard(name)
        origin, shard = open_shard(name, url, place, is_lazy=not is_eager or is_remote(url))
        if self.verify_hashes:
            expect_hash(origin, stated)
        if len(shard) == 0:
            raise BadShard(
                "holds no samples: members are named <key>.png, <key>.cls, <key>.txt and so on"
            )
        return shard

    def reader(self, task: Task, part: Part, limit: float | int | None, seed: int) -> Reader:
        """Check a part as a whole and return a reader of its samples."""
        where = f"source '{task.name}'" if task.index < 0 else f"task '{task.name}'"
        self.check_kind(task, where)
        shards = []
        for name in _shards(task, part):
            found = self.opened[name]
            if isinstance(found, str):
                self.faults.add(f"{where}: shard {name} {found}")
            else:
                shards.append(found)
        if len(shards) == len(_shards(task, part)):
            self.check_count(task, part, sum(map(len, shards)), where)
        self.check_keys(f"{where} ({part})", shards)
        return Reader(shards, choice(task, part, sum(map(len, shards)), limit, seed))

    def check_kind(self, task: Task, where: str) -> None:
        kinds = READ_KINDS if task.index >= 0 else (*READ_KINDS, "picture")
        if task.kind not in kinds:
            self.faults.add(
                f"{where} is of kind '{task.kind}', expected {', '.join(kinds)}: "
                "this version reads no others"
            )
        elif task.kind not in ("classify", "picture") and not is_read(task.text.lower()):
            self.faults.add(
                f"{where} takes its text from .{task.text}, expected .txt or a member that ends "
                "in .txt, such as .de.txt"
            )

    def check_count(self, task: Task, part: Part, counted: int, where: str) -> None:
        stated = task.size if part == "train" else task.test_size
        field_name = "size" if part == "train" else "test_size"
        if counted == 0:
            self.faults.add(f"{where} has no {part} samples: list a shard that has some")
        elif stated not in (0, counted):
            self.faults.add(
                f"{where} has {field_name} {stated} on the card and its {part} shards "
                f"hold {counted} samples: correct the card or fetch the shards again"
            )

    def check_keys(self, where: str, shards: Sequence[Shard]) -> None:
        # Shards that are opened later are left to `mmcl data check`.
        indexes = [s for s in shards if not isinstance(s, TarShard) or s.nbytes]
        lines = [
            f"{where}: key '{shown(key)}' comes twice, in {first} and in {second}: "
            "give every sample its own key"
            for key, first, second in _repeated(indexes)
        ]
        self.faults.add_some(lines, f"repeated keys in {where}")


def _parts(task: Task) -> tuple[Part, ...]:
    return ("test",) if task.is_probe else ("train", "test")


def _shards(task: Task, part: Part) -> tuple[str, ...]:
    return task.train if part == "train" else task.test


def _repeated(indexes: Sequence[Shard]) -> list[tuple[str, str, str]]:
    """Return (key, shard, other shard) for every key that is not the first of its name."""
    if not indexes:
        return []
    hashes = np.concatenate([index.key_hashes() for index in indexes])
    order = np.argsort(hashes, kind="stable")
    is_alike = hashes[order][1:] == hashes[order][:-1]
    starts = np.cumsum([0] + [len(index) for index in indexes])
    seen: dict[str, str] = {}
    found: list[tuple[str, str, str]] = []
    places = np.union1d(np.flatnonzero(is_alike), np.flatnonzero(is_alike) + 1)
    for position in np.sort(order[places]):
        shard = int(np.searchsorted(starts, position, side="right")) - 1
        index = indexes[shard]
        key = index.key(int(position - starts[shard]))
        if key in seen:
            found.append((key, seen[key], index.name))
        seen.setdefault(key, index.name)
    return found


def _counted(
    stream: TaskStream, readers: Mapping[tuple[int, Part], Reader], limit: float | int | None
) -> TaskStream:
    sized = copy.copy(stream)
    sized.tasks = tuple(_sized(task, readers, limit) for task in stream.tasks)
    sized.probes = tuple(_sized(task, readers, limit) for task in stream.probes)
    return sized


def _sized(
    task: Task, readers: Mapping[tuple[int, Part], Reader], limit: float | int | None
) -> Task:
    train = readers.get((task.index, "train"))
    size = limited(task.size, limit) if train is None else len(train)
    return replace(task, size=size, test_size=len(readers[task.index, "test"]))
