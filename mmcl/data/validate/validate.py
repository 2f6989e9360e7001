"""Validation of a whole stream before a run: its card, shards and samples, all errors at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path

import torch

from mmcl.core import Task, TaskStream
from mmcl.core.card import validate_card
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.parallel import WorkerPool
from mmcl.data.remote.location import default_cache
from mmcl.data.shards.json_shard import SUFFIX, read_json_set
from mmcl.data.shards.open_stream import OpenOptions, Progress, shard_names, stated_options
from mmcl.data.shards.reader import evenly_spaced, expect_max_samples
from mmcl.data.stored_sample import BadShard, Split
from mmcl.data.validate.aggregate import SPLITS, ResultAggregator
from mmcl.data.validate.results import StreamFindings, tasks_and_sources
from mmcl.data.validate.shard_check import ShardFindings, ShardJob, check_shard

_SMALL_STREAM_BYTES = 32 << 20
"""Streams up to here are validated sooner than a second process has started."""

_CHUNK_BYTES, _MAX_CHUNKS = 32 << 20, 64
"""Where shards are few, one is cut into chunks of this many bytes, and into this many at most."""

_IMAGE_BYTES_PER_TEXT_BYTE = 50
"""Bytes of images for each byte of instructions in LLaVA's own data, about."""


def check_stream(
    card: Path,
    *,
    num_workers: int | None = None,
    cache_dir: Path | None = None,
    cache_limit: int | None = None,
    allow_pipes: bool = False,
    progress: Progress | None = None,
    pixels: bool = False,
    max_samples: float | int | None = None,
    shards: int | None = None,
    max_pixels: int = MAX_PIXELS,
    scorers: Sequence[str] = (),
) -> StreamFindings:
    """Validate card, shards and samples of a stream, and count what it holds.

    Samples are decoded as in training. Needs 24 bytes for each, and 40 more at the end.

    Args:
        card: of the stream.
        num_workers: processes; None = one for each core, or this one alone if the stream is small.
        cache_dir: see ``open_stream``.
        cache_limit: see ``open_stream``.
        allow_pipes: see ``open_stream``.
        progress: called after every shard, or chunk of a large one: (done, total).
        pixels: compare images by pixels, so that one saved again in another file is found.
        max_samples: samples of a split that are decoded, as in ``open_stream`` but evenly spaced.
        shards: for a preview: open at most this many of every split, without hashes and counts.
        max_pixels: of the largest image that is no error.
        scorers: names that tasks may give theirs, none = any.

    Returns:
        the result; a stream is good if ``errors`` is empty.

    Raises:
        FileNotFoundError: if there is no card.
        ValueError: if ``max_samples`` or ``num_workers`` make no sense.
    """
    expect_max_samples(max_samples)
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}, expected 0 (this process alone) or more")
    try:
        read, errors = validate_card(card, scorers)
    except ValueError as error:
        return StreamFindings(card.stem, None, (str(error),), (), (), (), 1)
    options = OpenOptions(cache_dir or default_cache(), cache_limit, allow_pipes)
    # An error of the card may cause many in its samples, so they wait.
    max_samples = 0 if errors else max_samples
    jobs = _Jobs(TaskStream.of_card(read, card), options, pixels, max_samples, shards, max_pixels)
    return _validate(jobs, errors, _fitting(jobs) if num_workers is None else num_workers, progress)


@dataclass
class _Jobs:
    """Jobs that validate the shards of a stream, in the order of the card.

    Args:
        stream: to be validated.
        options: how its shards are opened.
        by_pixels: see ``ShardJob``.
        max_samples: of ``check_stream``.
        shards: of ``check_stream``.
        max_pixels: see ``ShardJob``.
        chunk_bytes: size of the chunks of a shard; None = it is validated as one.
    """

    stream: TaskStream
    options: OpenOptions
    by_pixels: bool
    max_samples: float | int | None
    shards: int | None
    max_pixels: int
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        self.tasks = tasks_and_sources(self.stream)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[ShardJob]:
        for task in self.tasks:
            for split in SPLITS:
                for job in self.of_split(task, split):
                    chunks = self.chunks(job)
                    for number in range(chunks):
                        yield replace(job, chunk=(number, chunks)) if chunks > 1 else job

    def of_split(self, task: Task, split: Split) -> Iterator[ShardJob]:
        names, max_samples = shard_names(task, split), self.max_samples
        indices = evenly_spaced(len(names), self.shards).tolist()
        if max_samples is not None and not (isinstance(max_samples, float) and max_samples <= 1):
            max_samples = -(-int(max_samples) // max(1, len(indices)))
        for index in indices:
            name = names[index]
            options = replace(self.options, key_until=task.key_until)
            if self.shards is None:
                options = stated_options(self.stream, task, name, options)
            url = self.stream.shard(name)
            yield ShardJob(
                task, split, name, url, options, max_samples, self.max_pixels, self.by_pixels
            )

    def chunks(self, job: ShardJob) -> int:
        """Return the number of chunks of a shard, so that few large ones occupy all cores."""
        if self.chunk_bytes is None:
            return 1
        return max(1, min(_MAX_CHUNKS, -(-_bytes_of(job) // self.chunk_bytes)))


def _validate(
    jobs: _Jobs, card_errors: Sequence[str], workers: int, progress: Progress | None
) -> StreamFindings:
    aggregator = ResultAggregator(jobs.stream)
    if workers > 1 and len(jobs) < _MAX_CHUNKS * workers:
        jobs.chunk_bytes = _CHUNK_BYTES
    count = len(jobs)
    for error in card_errors:
        aggregator.errors.add(error)
    if card_errors:
        aggregator.warnings.add("no sample was decoded: correct the card first")
    for done, (job, found) in enumerate(_results(jobs, workers), start=1):
        aggregator.add(job, found)
        if progress is not None:
            progress(done, count)
    return aggregator.findings()


def _results(jobs: Iterable[ShardJob], workers: int) -> Iterator[tuple[ShardJob, ShardFindings]]:
    """Yield every job and its result in order, from this process or from several."""
    jobs, same_jobs = tee(jobs)
    check = check_shard if workers < 2 else _check_on_one_core
    try:
        with WorkerPool(workers) as processes:
            yield from zip(same_jobs, processes.map(check, jobs), strict=True)
    except RuntimeError as error:  # of a lost process: those of a shard are results
        raise RuntimeError(
            "a process that validated a shard was killed, perhaps for want of memory: give a "
            "smaller num_workers"
        ) from error


def _check_on_one_core(job: ShardJob) -> ShardFindings:
    torch.set_num_threads(1)
    return check_shard(job)


def _fitting(jobs: _Jobs) -> int:
    """Return the number of processes that a stream is worth: one if it is small."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = 0
    for job in jobs:
        total += _bytes_of(job)
        if total > _SMALL_STREAM_BYTES:
            return cores or 1
    return 1


def _bytes_of(job: ShardJob) -> int:
    """Estimate the bytes that are read of a shard."""
    try:
        if job.name.endswith(SUFFIX):
            return _IMAGE_BYTES_PER_TEXT_BYTE * read_json_set(Path(job.url)).bytes
        return os.path.getsize(job.url)
    except (BadShard, OSError):
        return _SMALL_STREAM_BYTES if "://" in job.url else 0
