"""Everything that can be wrong with a stream, found before a run and told at once."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from mmcl.core import Task, TaskStream
from mmcl.core.card import survey_card
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.findings import StreamFindings, everything_in
from mmcl.data.gathering import Gathering
from mmcl.data.part_check import PARTS
from mmcl.data.prepare import Part, Progress
from mmcl.data.shard_check import ShardFindings, ShardWork, check_shard, places_looked_at
from mmcl.data.source import default_cache

_SMALL_STREAM_BYTES = 32 << 20
"""Streams up to here are gone through sooner than a second process has started."""

_WAITING = 4
"""Shards handed out ahead for each process."""


def check_stream(
    card: Path,
    *,
    workers: int | None = None,
    cache: Path | None = None,
    allow_pipes: bool = False,
    progress: Progress | None = None,
    pixels: bool = False,
    limit: float | int | None = None,
    shards: int | None = None,
    max_pixels: int = MAX_PIXELS,
    scorers: Sequence[str] = (),
) -> StreamFindings:
    """Verify card, shards and samples of a stream, and count what it holds.

    Every sample is made into a row by the rules of training. Test pictures that are trained on, in
    any task, are faults. Needs 24 bytes of memory for every sample, and 40 more at the end.

    Args:
        card: of the stream.
        workers: processes that go through shards; None = as many as there are cores, or none
            besides this one if the stream is small.
        cache: see ``prepare``.
        allow_pipes: see ``prepare``.
        progress: told after every shard: (shards done, shards in all).
        pixels: compare pictures by their pixels, so that the same picture in another file is found.
        limit: 200 = look into about 200 samples of every part of every task, 0.02 = into that share
            of them, spread evenly; shards, counts, keys and hashes are verified in whole.
        shards: for a glance: open at most so many shards of every part, spread evenly, and verify
            neither hashes nor counts.
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
    # What is wrong with samples may hang on what is wrong with the card, so they wait.
    limit = 0 if faults else limit
    stream = TaskStream.of_card(read, card)
    works = _Works(stream, cache or default_cache(), allow_pipes, pixels, limit, shards, max_pixels)
    gathering = Gathering(stream)
    for fault in faults:
        gathering.faults.add(fault)
    if faults:
        gathering.remarks.append("no sample was looked into: correct the card first")
    count = workers if workers is not None else _fitting(works)
    for done, (work, found) in enumerate(_results(iter(works), count), start=1):
        gathering.add(work, found)
        if progress is not None:
            progress(done, len(works))
    return gathering.findings()


class _Works:
    """The shards of a stream, in the order of the card, as work to be done.

    Args:
        stream: to be checked.
        cache: and all others see ``ShardWork``.
        allow_pipes: as there.
        by_pixels: as there.
        limit: of ``check_stream``.
        shards: of ``check_stream``.
        max_pixels: as there.
    """

    def __init__(
        self,
        stream: TaskStream,
        cache: Path,
        allow_pipes: bool,
        by_pixels: bool,
        limit: float | int | None,
        shards: int | None,
        max_pixels: int,
    ) -> None:
        self.stream, self.cache, self.allow_pipes = stream, cache, allow_pipes
        self.by_pixels, self.limit, self.max_pixels = by_pixels, limit, max_pixels
        self.shards, self.tasks = shards, everything_in(stream)

    def __len__(self) -> int:
        return sum(len(self.names(task, part)) for task in self.tasks for part in PARTS)

    def __iter__(self) -> Iterator[ShardWork]:
        for task in self.tasks:
            for part in PARTS:
                names = self.names(task, part)
                look = self.limit
                if look is not None and not _is_share(look):
                    look = -(-int(look) // max(1, len(names)))
                for name in names:
                    yield self.work(task, part, name, look)

    def names(self, task: Task, part: Part) -> Sequence[str]:
        names = task.train if part == "train" else task.test
        return [names[place] for place in places_looked_at(len(names), self.shards)]

    def work(self, task: Task, part: Part, name: str, look: float | int | None) -> ShardWork:
        stream, is_glance = self.stream, self.shards is not None
        return ShardWork(
            task=task,
            part=part,
            name=name,
            url=stream.shard(name),
            sha256="" if is_glance else stream.hashes.get(name, ""),
            count=0 if is_glance else stream.counts.get(name, 0),
            cache=self.cache,
            allow_pipes=self.allow_pipes,
            look=look,
            max_pixels=self.max_pixels,
            by_pixels=self.by_pixels,
        )


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
    """Return how many processes a stream is worth: one if it is small or has one shard."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = 0
    for work in works:
        try:
            total += os.path.getsize(work.url)
        except OSError:
            if "://" in work.url:
                total += _SMALL_STREAM_BYTES
        if total > _SMALL_STREAM_BYTES:
            return min(cores or 1, len(works))
    return 1


def _is_share(limit: float | int) -> bool:
    return isinstance(limit, float) and limit <= 1


def _expect_sense(limit: float | int | None, workers: int | None) -> None:
    if limit is not None and not (limit > 0 and (_is_share(limit) or limit == int(limit))):
        raise ValueError(
            f"limit is {limit!r}, expected a whole number of samples such as 200, or a share "
            "such as 0.02"
        )
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 (none besides this process) or more")
