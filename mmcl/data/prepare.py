"""What is checked before a run: shards found, indexed and counted; all faults told at once."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmcl.core import Task, TaskStream
from mmcl.core.randomness import ranks_of
from mmcl.data.faults import BadShard, Faults
from mmcl.data.index import ShardIndex, is_read, open_index
from mmcl.data.reader import Reader
from mmcl.data.row import READ_KINDS
from mmcl.data.shard import Numbers
from mmcl.data.source import default_cache, local_shard, sha256_of

Part = Literal["train", "test"]
Progress = Callable[[int, int], None]
"""Called with (parts done, parts in all); a part is the train or test shards of a task."""


@dataclass(frozen=True)
class PreparedStream:
    """A stream whose shards were found whole.

    Attributes:
        stream: the same stream with exact sizes (after the limit).
        readers: (column, part) -> reader of its samples.
        sources: number of a source -> reader of its samples.
    """

    stream: TaskStream
    readers: Mapping[tuple[int, Part], Reader]
    sources: Mapping[int, Reader] = field(default_factory=dict)

    def source_reader(self, number: int) -> Reader:
        """Return the reader of a source."""
        return self.sources[number]

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
    """Find, index and count all shards of a stream.

    Args:
        stream: as its card says.
        limit: 200 = at most 200 samples of every part of every task, 0.02 = that share of them (at
            least 1): a seeded choice that depends on the task's name alone, in recorded order.
        seed: of the limit's choice.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        cache: folder for remote shards, and for indexes of shards in read-only folders; default
            $MMCL_CACHE or the user's cache folder.
        cache_limit: bytes that remote shards may take there; None = no limit.
        verify_hashes: read every shard that has a hash on the card and compare.
        finished: tasks whose training shards are not opened; they may be gone.
        progress: told after every part of a task.

    Returns:
        The stream with exact sizes, and readers of its samples.

    Raises:
        ValueError: one line for every fault of the stream, or a bad limit.
    """
    _expect_limit(limit)
    work = _Work(stream, cache or default_cache(), allow_pipes, verify_hashes)
    parts = [
        (task, part)
        for task in stream.columns
        for part in _parts(task)
        if part == "test" or task.index not in finished
    ]
    readers: dict[tuple[int, Part], Reader] = {}
    for done, (task, part) in enumerate(parts, start=1):
        indexes = work.open_part(task, part)
        readers[task.index, part] = Reader(indexes, _choice(task, part, indexes, limit, seed))
        if progress is not None:
            progress(done, len(parts))
    work.faults.raise_all(stream.name)
    sized = copy.copy(stream)
    sized.tasks = tuple(_sized(task, readers, limit) for task in stream.tasks)
    sized.probes = tuple(_sized(task, readers, limit) for task in stream.probes)
    return PreparedStream(sized, readers)


@dataclass
class _Work:
    """What is known while a stream is gone through."""

    stream: TaskStream
    cache: Path
    allow_pipes: bool
    verify_hashes: bool
    faults: Faults = field(default_factory=Faults)
    opened: dict[str, ShardIndex | None] = field(default_factory=dict)

    def open_part(self, task: Task, part: Part) -> list[ShardIndex]:
        """Index the shards of a part and note what is wrong with them."""
        where = f"task '{task.name}'"
        if task.kind not in READ_KINDS:
            self.faults.add(
                f"{where} is of kind '{task.kind}', expected {', '.join(READ_KINDS)}: "
                "this version reads no others"
            )
        elif task.kind != "classify" and not is_read(task.text.lower()):
            self.faults.add(
                f"{where} takes its text from .{task.text}, expected .txt or a member that ends "
                "in .txt, such as .de.txt"
            )
        found = [self.open_shard(where, name) for name in _shards(task, part)]
        whole = [index for index in found if index is not None]
        if len(whole) == len(found):
            self.check_count(task, part, sum(map(len, whole)))
        self.check_keys(f"{where} ({part})", whole)
        return whole

    def open_shard(self, where: str, name: str) -> ShardIndex | None:
        """Return the index of a shard, None if it has a fault."""
        if name not in self.opened:
            self.opened[name] = None
            try:
                self.opened[name] = self.index_of(name)
            except BadShard as fault:
                self.faults.add(f"{where}: shard {name} {fault}")
            except OSError as error:
                self.faults.add(f"{where}: shard {name} cannot be read ({error})")
        return self.opened[name]

    def index_of(self, name: str) -> ShardIndex:
        path = local_shard(self.stream.shard(name), self.cache, self.allow_pipes)
        stated = self.stream.hashes.get(name, "").lower()
        if self.verify_hashes and stated:
            own = sha256_of(path)
            if own != stated:
                raise BadShard(
                    f"has the sha256 {own} and the card says {stated}: it is not the shard that "
                    f"the card was written for; delete {path} and fetch or build it again"
                )
        index = open_index(path, name, self.cache)
        if len(index) == 0:
            raise BadShard(
                "holds no samples: members are named <key>.png, <key>.cls, <key>.txt and so on"
            )
        return index

    def check_count(self, task: Task, part: Part, counted: int) -> None:
        stated = task.size if part == "train" else task.test_size
        field_name = "size" if part == "train" else "test_size"
        if counted == 0:
            self.faults.add(f"task '{task.name}' has no {part} samples: list a shard that has some")
        elif stated not in (0, counted):
            self.faults.add(
                f"task '{task.name}' has {field_name} {stated} on the card and its {part} shards "
                f"hold {counted} samples: correct the card or fetch the shards again"
            )

    def check_keys(self, where: str, indexes: Sequence[ShardIndex]) -> None:
        lines = [
            f"{where}: key '{key}' comes twice, in {first} and in {second}: "
            "give every sample its own key"
            for key, first, second in _repeated(indexes)
        ]
        self.faults.add_some(lines, f"repeated keys in {where}")


def _parts(task: Task) -> tuple[Part, ...]:
    return ("test",) if task.is_probe else ("train", "test")


def _shards(task: Task, part: Part) -> tuple[str, ...]:
    return task.train if part == "train" else task.test


def _repeated(indexes: Sequence[ShardIndex]) -> list[tuple[str, str, str]]:
    """Return (key, shard, other shard) for every key that is not the first of its name."""
    if not indexes:
        return []
    hashes = np.concatenate([index.key_hash for index in indexes])
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


def _expect_limit(limit: float | int | None) -> None:
    if limit is None:
        return
    is_share = isinstance(limit, float) and 0 < limit <= 1
    is_count = not isinstance(limit, bool) and limit >= 1 and limit == int(limit)
    if not (is_share or is_count):
        raise ValueError(
            f"limit is {limit!r}, expected a whole number of samples such as 200, or a share "
            "such as 0.02"
        )


def _limited(count: int, limit: float | int | None) -> int:
    if limit is None:
        return count
    if isinstance(limit, float) and limit <= 1:
        return min(count, max(1, round(limit * count)))
    return min(count, int(limit))


def _choice(
    task: Task, part: Part, indexes: Sequence[ShardIndex], limit: float | int | None, seed: int
) -> Numbers | None:
    """Return the positions that the limit leaves, in recorded order; None = all."""
    count = sum(map(len, indexes))
    kept = _limited(count, limit)
    if kept == count:
        return None
    group = zlib.crc32(f"{part}/{task.name}".encode())
    ranks = ranks_of(seed, group, torch.arange(count))
    chosen: Numbers = ranks.argsort(stable=True)[:kept].sort().values.numpy()
    return chosen


def _sized(
    task: Task, readers: Mapping[tuple[int, Part], Reader], limit: float | int | None
) -> Task:
    train = readers.get((task.index, "train"))
    size = _limited(task.size, limit) if train is None else len(train)
    return replace(task, size=size, test_size=len(readers[task.index, "test"]))
