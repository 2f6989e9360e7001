"""How long a new task takes to its first batch, and what ten million samples take in memory."""

from __future__ import annotations

import gc
import os
import statistics
import time
from pathlib import Path

from webdataset.writer import TarWriter

from mmcl.core import TaskStream
from mmcl.data import Reader, open_stream, train_loader
from mmcl.data.batches.batch_plan import EpochPlan, Mixture
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.tar_shard import TarShard
from mmcl.models.open_clip.clip_transform import ClipTransform
from tests.benchmarks.data_loops import BATCH, CROP, SIDE

SAMPLES_A_SHARD = 10_000


def start(folder: Path, rounds: int = 7) -> str:
    """Tell the seconds from asking for a new task's loader to its first batch of 64 pictures."""
    prepared = open_stream(TaskStream.read(folder / "card.yaml"))
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        loader = train_loader(
            prepared,
            0,
            ClipTransform(SIDE, random_crop_scale=CROP),
            replay_plan=None,
            global_batch_size=BATCH,
            seed=0,
        )
        next(iter(loader))
        taken.append(time.perf_counter() - begin)
    return (
        f"first batch of a task: {statistics.median(taken):.3f} s, slowest of {rounds} "
        f"{max(taken):.3f} s (wanted at most 0.2 s)"
    )


def memory(folder: Path, millions: int) -> str:
    """Tell the bytes a sample that index and order take, in shards of 10,000 samples.

    The shards are links to one tar of pictures of a few bytes with labels; each is indexed, opened
    and held for itself, and batches of an epoch are laid out.
    """
    folder.mkdir()
    shards = millions * 1_000_000 // SAMPLES_A_SHARD
    with TarWriter(str(folder / "00000.tar")) as tar:
        for number in range(SAMPLES_A_SHARD):
            tar.write({"__key__": f"{number:09d}", "jpg": b"picture", "txt": "a text"})
    for shard in range(1, shards):
        os.link(folder / "00000.tar", folder / f"{shard:05d}.tar")
    opened = [
        TarShard(LocalFile(folder / f"{shard:05d}.tar"), f"{shard:05d}.tar", folder)
        for shard in range(shards)
    ]
    _ = opened[0].index
    plan = EpochPlan(Mixture(1000, 8), seed=0, task=0, epoch=0)
    plan.batch(0)
    gc.collect()
    before = _resident()
    reader = Reader(opened)
    held = sum(shard.nbytes for shard in opened)
    plan = EpochPlan(Mixture(len(reader), 4096), seed=0, task=0, epoch=0)
    for number in (0, len(plan) // 2, len(plan) - 1):
        reader.read(int(plan.batch(number)[0]))
    gc.collect()
    grown, count = _resident() - before, len(reader)
    return (
        f"index and order of {count:,} samples in {shards:,} shards: {grown / count:.1f} bytes a "
        f"sample resident, {held / count:.1f} of them arrays (wanted at most 64); reckoned for "
        f"100 million: {1e8 * grown / count / 1e9:.1f} GB"
    )


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
