"""Opening of a stream: its shards are found, indexed, counted and checked, local or remote."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmcl.core import Task, TaskStream
from mmcl.core.card import KeyUntil
from mmcl.data.remote.location import (
    default_cache,
    is_remote,
    resolve_url,
    sha256_of,
)
from mmcl.data.shards.json_shard import SUFFIX, JsonShard
from mmcl.data.shards.reader import (
    Reader,
    Shard,
    expect_max_samples,
    hold_out,
    subset_indices,
    subset_size,
    validation_size,
)
from mmcl.data.shards.sample_fields import SampleFields, UnusedMembers, field_error
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import NAMED, BadShard, ErrorList, IntArray, Split

Progress = Callable[[int, int], None]
"""Called with (shards done, shards in total)."""
READABLE_TASK_TYPES = ("classification", "captioning", "retrieval", "instruction")
EAGER = 1000
"""A stream of at most this many shards has all local ones opened before the run."""
_THREADS = 8


@dataclass(frozen=True)
class OpenOptions:
    """Options of fetching and opening a shard.

    Attributes:
        cache: its ``cache_dir``.
        cache_limit: see ``open_stream``.
        allow_pipes: see ``open_stream``.
        sha256: of the card in lower case, "" = not stated.
        count: samples as the card says, None = not stated.
        key_until: where the keys of its samples end.
    """

    cache: Path
    cache_limit: int | None = None
    allow_pipes: bool = False
    sha256: str = ""
    count: int | None = None
    key_until: KeyUntil = "first_dot"


def open_shard(
    name: str, url: str, options: OpenOptions, *, verify_hash: bool = False, is_lazy: bool = False
) -> Shard:
    """Open a shard.

    Args:
        name: name of the shard on the card.
        url: a path or URL.
        options: options of opening it.
        verify_hash: compare its sha256 with the card's, if that states one.
        is_lazy: do not open a tar whose count is stated; a remote one is not fetched yet.

    Raises:
        BadShard: if it is missing, refused, empty, no whole shard, or has another hash or count
            than the card.
        OSError: if it cannot be read.
    """
    origin = resolve_url(
        url, options.cache, allow_pipes=options.allow_pipes, limit_bytes=options.cache_limit,
        sha256=options.sha256,
    )  # fmt: skip
    shard: Shard
    if name.endswith(SUFFIX):
        shard = JsonShard(origin, name, options.cache)
    else:
        shard = TarShard(origin, name, options.cache, options.count, options.key_until)
        if options.count is None or not is_lazy:
            _ = shard.index
        elif not origin.is_remote:
            origin.path()
    if verify_hash and options.sha256:
        path = origin.path()
        actual = sha256_of(path)
        if actual != options.sha256:
            raise BadShard(
                f"has the sha256 {actual} and the card says {options.sha256}: it is not the shard "
                f"that the card was written for; delete {path} and fetch or build it again"
            )
    if len(shard) == 0:
        raise BadShard(
            "holds no samples: members are named <key>.png, <key>.cls, <key>.txt and so on"
        )
    return shard


@dataclass(frozen=True)
class OpenStream:
    """A stream whose shards were found and opened.

    Attributes:
        stream: the same stream with exact sizes, after ``max_samples``.
        readers: (column, train, validation or test) -> reader of these samples.
        sources: number of a source that some task mixes in -> reader of its samples.
        notes: members that no task uses, as far as shards are open.
    """

    stream: TaskStream
    readers: Mapping[tuple[int, Split], Reader]
    sources: Mapping[int, Reader] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def reader(self, column: int, split: Split) -> Reader:
        """Return the reader of one split of a task or eval-only task.

        Raises:
            RuntimeError: if it is the training split of an eval-only task, which has none, or of a
                finished task whose data was released.
        """
        if (column, split) not in self.readers:
            name = self.stream.evaluated_task(column).name
            raise RuntimeError(
                f"the {split} split of '{name}' is not open to this run: it belongs to an "
                "eval-only task or to a finished task whose data was released; storage='reference' "
                "keeps old shards in use, storage='copy' stores the samples that are replayed"
            )
        return self.readers[column, split]


def open_stream(
    stream: TaskStream,
    *,
    max_samples: float | int | None = None,
    validation_share: float = 0.0,
    seed: int = 0,
    allow_pipes: bool = False,
    cache_dir: Path | None = None,
    cache_limit: int | None = None,
    verify_hashes: bool = False,
    finished: Collection[int] = (),
    progress: Progress | None = None,
) -> OpenStream:
    """Open a stream: find, index and count all its shards, several at a time.

    A shard whose samples the card counts is opened at its first read, if it is remote or one of
    more than ``EAGER``; an error in it ends the run then.

    Args:
        stream: as its card says.
        max_samples: 200 = at most 200 samples of every split of every task, 0.02 = that fraction: a
            seeded subset that depends on the task's name alone, in recorded order.
        validation_share: fraction of every training split that is its validation split instead.
        seed: of these subsets.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        cache_dir: of remote shards and indexes of read-only ones; None = $MMCL_CACHE or the user's.
        cache_limit: bytes that remote shards may take there; None = no limit.
        verify_hashes: read every shard that has a hash on the card and compare.
        finished: tasks whose training shards are not opened; they may be gone.
        progress: called after every shard.

    Returns:
        the stream with exact sizes, readers of its samples, and notes.

    Raises:
        ValueError: one line for every error of the stream, or a bad max_samples.
    """
    expect_max_samples(max_samples)
    options = OpenOptions(cache_dir or default_cache(), cache_limit, allow_pipes)
    work = _Work(stream, options, verify_hashes, max_samples, seed)
    origins = _origins(stream, finished)
    splits = _original_splits(stream, origins)
    mixed = sorted({number for task in stream.tasks for number, _ in task.mixture})
    own = {n: stream.sources[n - 1].task for n in mixed}
    work.open_all([*splits, *((source, "train") for source in own.values())], progress)
    readers = _shared(work.readers(splits, validation_share), origins)
    sources = {number: work.reader(each, "train") for number, each in own.items()}
    work.errors.raise_all(stream.name)
    stream = _counted(stream, readers, max_samples, validation_share)
    return OpenStream(stream, readers, sources, work.unused.lines())


def _origins(stream: TaskStream, finished: Collection[int]) -> dict[tuple[int, Split], int]:
    """Return (column, split) -> column whose reader it has, of all splits that are opened.

    A repeated task has the reader of the first, so also the same subset and validation part.
    """
    return {
        (task.index, split): stream.first_occurrence(task.index)
        for task in stream.all_tasks
        for split in _splits_of(task)
        if split == "test" or task.index not in finished
    }


def _original_splits(
    stream: TaskStream, origins: Mapping[tuple[int, Split], int]
) -> list[tuple[Task, Split]]:
    needed = dict.fromkeys((origin, split) for (_, split), origin in origins.items())
    return [(stream.evaluated_task(number), split) for number, split in needed]


def _shared(
    readers: Mapping[tuple[int, Split], Reader], origins: Mapping[tuple[int, Split], int]
) -> dict[tuple[int, Split], Reader]:
    """Give every column the readers of its origin, and the validation part with training."""
    found: dict[tuple[int, Split], Reader] = {}
    for (number, split), origin in origins.items():
        found[number, split] = readers[origin, split]
        if split == "train" and (origin, "validation") in readers:
            found[number, "validation"] = readers[origin, "validation"]
    return found


def display_name(task: Task) -> str:
    """Return the name of a task, eval-only task or source as messages show it."""
    return f"source '{task.name}'" if task.index < 0 else f"task '{task.name}'"


def shard_names(task: Task, split: Split) -> tuple[str, ...]:
    """Return the shards of a split as the card names them."""
    return task.train if split == "train" else task.test


def stated_options(stream: TaskStream, task: Task, name: str, options: OpenOptions) -> OpenOptions:
    """Add what the card states for a shard of a task: hash, sample count, and end of the keys."""
    return replace(
        options, sha256=stream.hashes.get(name, "").lower(), count=stream.counts.get(name),
        key_until=task.key_until,
    )  # fmt: skip


def task_type_error(task: Task) -> str:
    """Return why no sample of this task type can be read, "" if they can."""
    readable = READABLE_TASK_TYPES if task.index >= 0 else (*READABLE_TASK_TYPES, "image")
    if task.task_type not in readable:
        return (
            f"{display_name(task)} has task_type '{task.task_type}', "
            f"expected {', '.join(readable)}: this version reads no others"
        )
    error = field_error(task)
    return f"{display_name(task)} {error}" if error else ""


def count_error(task: Task, split: Split, counted: int) -> str:
    """Return how the samples of a split differ from the size on the card, "" if they do not."""
    key, stated = ("size", task.size) if split == "train" else ("test_size", task.test_size)
    if counted == 0:
        return f"{display_name(task)} has no {split} samples: list a shard that has some"
    if stated in (0, counted):
        return ""
    return (
        f"{display_name(task)} has {key} {stated} on the card and its {split} shards "
        f"hold {counted} samples: correct the card or fetch the shards again"
    )


def add_repeated_keys(
    errors: ErrorList,
    where: str,
    hashes: npt.NDArray[np.uint64],
    name_of: Callable[[int], tuple[str, str]],
) -> None:
    """Add an error for every key that occurs twice in a split, named ``where``.

    ``hashes`` are (n,) of the keys of all samples, ``name_of`` index among them -> (key, shard).
    """
    later, first = find_repeats(hashes)
    lines: list[str] = []
    for index, before in zip(later, first, strict=True):
        (key, shard), (other, other_shard) = name_of(int(index)), name_of(int(before))
        if key == other:  # two keys may share a hash
            lines.append(
                f"{where}: key '{key}' comes twice, in {other_shard} and in {shard}: "
                "give every sample its own key"
            )
        if len(lines) == NAMED:
            break
    count = len(later) if len(lines) == NAMED else len(lines)
    errors.add_some(lines, f"repeated keys in {where}", count)


def find_repeats(hashes: npt.NDArray[np.uint64]) -> tuple[IntArray, IntArray]:
    """Find the duplicates among (n,) hashes.

    Returns:
        (r,) indices of hashes that occurred before, rising; (r,) index of the first of each.
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    first_of_each = first[inverse]
    later = np.flatnonzero(first_of_each != np.arange(len(hashes)))
    return later, first_of_each[later]


@dataclass
class _Work:
    """Shards opened so far, and the errors found in them."""

    stream: TaskStream
    options: OpenOptions
    verify_hashes: bool
    max_samples: float | int | None
    seed: int
    errors: ErrorList = field(default_factory=ErrorList)
    opened: dict[tuple[str, KeyUntil], Shard | str] = field(default_factory=dict)
    unused: UnusedMembers = field(default_factory=UnusedMembers)

    def open_all(self, splits: Sequence[tuple[Task, Split]], progress: Progress | None) -> None:
        """Open every shard once; of one that cannot be opened the reason is stored."""
        tasks: dict[tuple[str, KeyUntil], Task] = {}
        for task, split in splits:
            tasks |= {(name, task.key_until): task for name in shard_names(task, split)}
        is_eager = len(tasks) <= EAGER
        with ThreadPoolExecutor(min(_THREADS, 2 * (os.cpu_count() or 1))) as pool:
            found = pool.map(lambda key: self.open_shard(tasks[key], key[0], is_eager), tasks)
            for done, (key, shard) in enumerate(zip(tasks, found, strict=True), start=1):
                self.opened[key] = shard
                if progress is not None:
                    progress(done, len(tasks))

    def open_shard(self, task: Task, name: str, is_eager: bool) -> Shard | str:
        """Return a shard, or why it cannot be opened."""
        options = stated_options(self.stream, task, name, self.options)
        url = self.stream.shard(name)
        is_lazy = not is_eager or is_remote(url)
        try:
            return open_shard(name, url, options, verify_hash=self.verify_hashes, is_lazy=is_lazy)
        except BadShard as error:
            return str(error)
        except OSError as error:
            return f"cannot be read ({error})"

    def readers(
        self, splits: Sequence[tuple[Task, Split]], validation_share: float
    ) -> dict[tuple[int, Split], Reader]:
        """Return the readers of splits, and of the validation parts that are held out of them."""
        readers = {(task.index, split): self.reader(task, split) for task, split in splits}
        for task, split in splits if validation_share else ():
            reader = readers[task.index, split]
            if split == "train" and len(reader):  # an empty split is an error already
                parts = hold_out(reader, task, validation_share, self.seed)
                readers[task.index, "train"], readers[task.index, "validation"] = parts
        return readers

    def reader(self, task: Task, split: Split) -> Reader:
        """Check a split as a whole and return a reader of its samples."""
        errors = [task_type_error(task)]
        shards = []
        for name in shard_names(task, split):
            found = self.opened[name, task.key_until]
            if isinstance(found, str):
                errors.append(f"{display_name(task)}: shard {name} {found}")
            else:
                shards.append(found)
        count = sum(map(len, shards))
        if len(shards) == len(shard_names(task, split)):
            errors.append(count_error(task, split, count))
        for error in errors:
            self.errors.add(error)
        self.check_keys(f"{display_name(task)} ({split})", shards)
        fields = SampleFields.of(task)
        if not errors[0]:
            self.check_fields(task, fields, shards)
        indices = subset_indices(task, split, count, self.max_samples, self.seed)
        return Reader(shards, indices, fields)

    def check_fields(self, task: Task, fields: SampleFields, shards: Sequence[Shard]) -> None:
        """Check that the members of opened shards hold the task's fields, and note the others."""
        lines = []
        for shard in shards:
            if isinstance(shard, TarShard) and not shard.nbytes:  # opened at its first read
                continue
            error = shard.field_error(fields)
            if error:
                lines.append(f"{display_name(task)}: shard {shard.name} {error}")
            elif isinstance(shard, TarShard):
                counts, used = shard.index.counts(), shard.members(fields)
                self.unused.add(shard.name, len(shard), counts, used, task.ignore_members)
        self.errors.add_some(lines, f"shards of {display_name(task)} whose members do not fit")

    def check_keys(self, where: str, shards: Sequence[Shard]) -> None:
        # Shards that are opened later are left to `mmcl data validate`.
        opened = [s for s in shards if not isinstance(s, TarShard) or s.nbytes]
        if opened:
            hashes = np.concatenate([shard.key_hashes() for shard in opened])
            add_repeated_keys(self.errors, where, hashes, Reader(opened).name_of)


def _splits_of(task: Task) -> tuple[Split, ...]:
    return ("test",) if task.is_eval_only else ("train", "test")


def _counted(
    stream: TaskStream,
    readers: Mapping[tuple[int, Split], Reader],
    max_samples: float | int | None,
    validation_share: float,
) -> TaskStream:
    def sized(task: Task) -> Task:
        train = readers.get((task.index, "train"))
        size = subset_size(task.size, max_samples) if train is None else len(train)
        if train is None and size:
            size -= validation_size(size, validation_share)
        return replace(task, size=size, test_size=len(readers[task.index, "test"]))

    counted = copy.copy(stream)
    counted.tasks = tuple(map(sized, stream.tasks))
    counted.eval_only_tasks = tuple(map(sized, stream.eval_only_tasks))
    return counted
