"""Everything that can be wrong with a stream, found before a run and told at once."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch

from mmcl.core import Task, TaskStream
from mmcl.core.card import survey_card
from mmcl.data.checks.findings import StreamFindings, everything_in
from mmcl.data.checks.gathering import Gathering
from mmcl.data.checks.part_check import PARTS
from mmcl.data.checks.shard_check import ShardFindings, ShardWork, check_shard, places_looked_at
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.faults import BadShard
from mmcl.data.limit import expect_limit
from mmcl.data.prepare import Part, Progress
from mmcl.data.shards.loose import SUFFIX, read_loose_set
from mmcl.data.shards.opening import Place
from mmcl.data.source import default_cache

_SMALL_STREAM_BYTES = 32 << 20
"""Streams up to here are gone through sooner than a second process has started."""

_PIECE_BYTES, _MOST_PIECES = 32 << 20, 64
"""Where shards are few, one is cut into pieces of so many bytes, and into so many at most."""

_PICTURES_PER_TEXT = 50
"""Bytes of pictures that come with a byte of instructions in LLaVA's own data, about."""

_WAITING = 4
"""Shards handed out ahead for each process."""


def check_stream(
    card: Path,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    cache_limit: int | None = None,
    allow_pipes: bool = False,
    progress: Progress | None = None,
    pixels: bool = False,
    limit: float | int | None = None,
    shards: int | None = None,
    max_pixels: int = MAX_PIXELS,
    scorers: Sequence[str] = (),
) -> StreamFindings:
    """Verify card, shards and samples of a stream, and count what it holds.

    Samples are made into rows as in training. Needs 24 bytes for each, and 40 more at the end.

    Args:
        card: of the stream.
        workers: processes; None = one for each core, or this one alone if the stream is small.
        cache: see ``prepare``.
        cache_limit: see ``prepare``.
        allow_pipes: see ``prepare``.
        progress: told after every shard, or piece of a large one: (done, in all).
        pixels: compare pictures by pixels, so that one saved again in another file is found.
        limit: samples of every part that are looked into, as in ``prepare`` but spread evenly.
        shards: for a glance: open at most so many of every part, without hashes and counts.
        max_pixels: of the largest picture that is no fault.
        scorers: names that tasks may give theirs, none = any.

    Returns:
        what was found; a stream is good if ``faults`` is empty.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if the limit or the workers make no sense.
    """
    _expect_sense(limit, workers)
    try:
        read, faults = survey_card(card, scorers)
    except ValueError as error:
        return StreamFindings(card.stem, None, (str(error),), (), ())
    place = Place(cache or default_cache(), cache_limit, allow_pipes)
    # What is wrong with samples may hang on what is wrong with the card, so they wait.
    look = 0 if faults else limit
    works = _Works(TaskStream.of_card(read, card), place, pixels, look, shards, max_pixels)
    return _go_through(works, faults, _fitting(works) if workers is None else workers, progress)


class _Works:
    """The shards of a stream, in the order of the card, as work to be done.

    Args:
        stream: to be checked.
        place: how its shards are opened, without hash and count of any.
        by_pixels: see ``ShardWork``.
        limit: of ``check_stream``.
        shards: of ``check_stream``.
        max_pixels: see ``ShardWork``.
    """

    def __init__(
        self,
        stream: TaskStream,
        place: Place,
        by_pixels: bool,
        limit: float | int | None,
        shards: int | None,
        max_pixels: int,
    ) -> None:
        self.stream, self.place, self.tasks = stream, place, everything_in(stream)
        self.by_pixels, self.limit, self.max_pixels = by_pixels, limit, max_pixels
        self.shards = shards
        self.piece_bytes: int | None = None

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[ShardWork]:
        for task in self.tasks:
            for part in PARTS:
                names = self.names(task, part)
                look = self.limit
                if look is not None and not _is_share(look):
                    look = -(-int(look) // max(1, len(names)))
                for name in names:
                    work = self.work(task, part, name, look)
                    pieces = self.pieces(work)
                    for number in range(pieces):
                        yield replace(work, piece=(number, pieces)) if pieces > 1 else work

    def pieces(self, work: ShardWork) -> int:
        """Return into how many pieces a shard is cut, so that few large ones occupy all cores."""
        if self.piece_bytes is None:
            return 1
        return max(1, min(_MOST_PIECES, -(-_bytes_of(work) // self.piece_bytes)))

    def names(self, task: Task, part: Part) -> Sequence[str]:
        names = task.train if part == "train" else task.test
        return [names[place] for place in places_looked_at(len(names), self.shards)]

    def work(self, task: Task, part: Part, name: str, look: float | int | None) -> ShardWork:
        stream, place = self.stream, self.place
        if self.shards is None:
            sha256 = stream.hashes.get(name, "").lower()
            place = replace(place, sha256=sha256, count=stream.counts.get(name))
        url = stream.shard(name)
        return ShardWork(task, part, name, url, place, look, self.max_pixels, self.by_pixels)


def _go_through(
    works: _Works, card_faults: Sequence[str], workers: int, progress: Progress | None
) -> StreamFindings:
    gathering, shards = Gathering(works.stream), len(works)
    if workers > 1 and shards < _MOST_PIECES * workers:
        works.piece_bytes = _PIECE_BYTES
    count = len(works)
    for fault in card_faults:
        gathering.faults.add(fault)
    if card_faults:
        gathering.remarks.append("no sample was looked into: correct the card first")
    for done, (work, found) in enumerate(_results(iter(works), workers), start=1):
        gathering.add(work, found)
        if progress is not None:
            progress(done, count)
    return gathering.findings()


def _results(works: Iterator[ShardWork], workers: int) -> Iterator[tuple[ShardWork, ShardFindings]]:
    """Go through shards, in this process or in others, and give what was found in their order."""
    if workers <= 1:
        for work in works:
            yield work, check_shard(work)
        return
    # A fresh process: a fork would copy the locks that threads of this one may hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))
    waiting: deque[tuple[ShardWork, Future[ShardFindings]]] = deque()
    try:
        for work in works:
            waiting.append((work, pool.submit(check_shard, work)))
            if len(waiting) >= workers * _WAITING:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that went through a shard was ended from outside, perhaps for want of "
            "memory: give fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _fitting(works: _Works) -> int:
    """Return how many processes a stream is worth: one if it is small."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = 0
    for work in works:
        total += _bytes_of(work)
        if total > _SMALL_STREAM_BYTES:
            return cores or 1
    return 1


def _bytes_of(work: ShardWork) -> int:
    """Return about how many bytes there are to be gone through in a shard."""
    try:
        if work.name.endswith(SUFFIX):
            return _PICTURES_PER_TEXT * read_loose_set(Path(work.url)).bytes
        return os.path.getsize(work.url)
    except (BadShard, OSError):
        return _SMALL_STREAM_BYTES if "://" in work.url else 0


def _is_share(limit: float | int) -> bool:
    return isinstance(limit, float) and limit <= 1


def _expect_sense(limit: float | int | None, workers: int | None) -> None:
    expect_limit(limit)
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (none besides this process) or more")
