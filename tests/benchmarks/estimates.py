"""What 10 million to 10 billion pairs over 100 tasks take: measured constants, stated assumptions.

    python -m tests.benchmarks.estimates

Measured here: index bytes a sample, seconds to index a sample, to lay out a batch, to read and to
decode a picture on one core. Assumed: what the machines do that are not here, see ``Assumed``.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from mmcl.core import TaskStream
from mmcl.data import decode_image, open_stream
from mmcl.data.batches.batch_plan import EpochPlan, Mixture
from mmcl.data.remote.location import LocalFile
from mmcl.data.shards.tar_shard import TarShard
from mmcl.models.open_clip.clip_transform import ClipTransform
from tests.benchmarks.data_loops import CROP, SIDE, write_pictures

SIZES = (10_000_000, 100_000_000, 1_000_000_000, 10_000_000_000)
GLOBAL_BATCH = 32_768


@dataclass(frozen=True)
class Assumed:
    """Numbers of the machines and the data; change them to your own."""

    tasks: int = 100
    pair_bytes: int = 30_000
    pairs_a_gpu_second: int = 1_000
    gpus_a_node: int = 8
    nodes: int = 8
    cores_a_gpu: int = 8
    learning_weights: int = 150_000_000
    test_pairs_a_task: int = 5_000
    share_recalled: float = 0.25
    shard_bytes: int = 300_000_000
    first_byte_seconds: float = 0.03
    links_gbit: tuple[int, int] = (10, 100)


@dataclass(frozen=True)
class Measured:
    """Seconds of one core, and bytes."""

    index_bytes: float
    index_seconds: float
    layout_seconds: float
    read_seconds: float
    decode_seconds: float


def main() -> None:
    """Print constants and table."""
    torch.set_num_threads(1)
    assumed, measured = Assumed(), measure()
    for part in (assumed, measured):
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        named = [
            f"{n} {v if isinstance(v, tuple) else format(v, '.3g')}" for n, v in values.items()
        ]
        print(f"{type(part).__name__.lower()}: {', '.join(named)}")
    print("\n| pairs | " + " | ".join(f"{size:,}" for size in SIZES) + " |")
    print("|---|" + "---|" * len(SIZES))
    columns = [
        {**reckon(size, assumed, measured), **fetching(size, assumed, measured)} for size in SIZES
    ]
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


def measure(count: int = 512) -> Measured:
    """Measure the constants on pictures of 224 x 224; the best of three each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder, count)
        shard = folder / "train-0.tar"

        def index() -> TarShard:
            for old in folder.glob("*.index*"):
                old.unlink()
            opened = TarShard(LocalFile(shard), shard.name, folder)
            _ = opened.index
            return opened

        opened, per_index = index(), best(index) / (count // 4)
        reader = open_stream(TaskStream.read(folder / "card.yaml")).reader(0, "train")
        files = [reader.read(number).members["jpg"] for number in range(count)]
        transform = ClipTransform(SIDE, random_crop_scale=CROP)
        plan = EpochPlan(Mixture(1_000_000_000, GLOBAL_BATCH), seed=0, task=0, epoch=0)
        return Measured(
            opened.nbytes / len(opened),
            per_index,
            best(lambda: plan.batch(12_345)) / GLOBAL_BATCH,
            best(lambda: [reader.read(number) for number in range(count)]) / count,
            best(lambda: [transform(decode_image(data), None, 0) for data in files]) / count,
        )


def best(work: object, turns: int = 3) -> float:
    """Return the least processor seconds of a few turns."""
    taken = []
    for _ in range(turns):
        begin = time.process_time()
        work()  # type: ignore[operator]
        taken.append(time.process_time() - begin)
    return min(taken)


def reckon(pairs: int, given: Assumed, found: Measured) -> dict[str, str]:
    """Reckon one column: ``pairs`` are seen once, in equal tasks, with recalled rows beside."""
    gpus = given.nodes * given.gpus_a_node
    rows = pairs / (1 - given.share_recalled)
    steps = rows / GLOBAL_BATCH
    decode = found.read_seconds + found.decode_seconds + found.layout_seconds
    seconds = rows / (gpus * given.pairs_a_gpu_second)
    columns = given.tasks * (given.tasks + 1) * given.test_pairs_a_task
    a_step = 2 * 4 * given.learning_weights * (gpus - 1) / gpus
    return {
        "shards": size(pairs * given.pair_bytes),
        "index files and memory": size(pairs * found.index_bytes),
        "indexing once, one node's cores": duration(
            pairs * found.index_seconds / (given.cores_a_gpu * given.gpus_a_node)
        ),
        "order in memory": "0 B"
        if pairs / given.tasks > 1 << 20
        else size(8 * pairs / given.tasks),
        "optimiser steps": f"{steps:,.0f}",
        f"training on {gpus} GPUs": duration(seconds),
        "scoring the matrix": duration(columns / (3 * gpus * given.pairs_a_gpu_second)),
        "cores to decode, a GPU": f"{given.pairs_a_gpu_second * decode:.2f}",
        "gradients a GPU sends, per second": size(a_step * steps / seconds),
        "checkpoints of all tasks": size(given.tasks * 4 * given.learning_weights),
    }


def fetching(pairs: int, given: Assumed, found: Measured) -> dict[str, str]:
    """Reckon what a node fetches in an epoch: with a lane for every GPU, and without lanes."""
    gpus = given.nodes * given.gpus_a_node
    seconds = pairs / (1 - given.share_recalled) / (gpus * given.pairs_a_gpu_second)
    whole = pairs * given.pair_bytes
    # Neighbors on the card are lanes of one node, but for one edge a node and task.
    edges = given.tasks * (given.nodes - 1) / given.nodes
    laned = min(whole, whole / given.nodes + edges * given.shard_bytes)
    new_a_second = pairs / given.nodes / seconds
    rows = {
        "a node fetches, without lanes": size(whole),
        "a node fetches, in lanes": size(laned),
        "a node fetches a second, without": size(whole / seconds),
        "a node fetches a second, in lanes": size(laned / seconds),
        "requests of a node, whole shards in lanes": f"{max(1, laned / given.shard_bytes):,.0f}",
        "requests of a node, a byte range a pair": f"{pairs / given.nodes:,.0f}",
        "byte ranges in flight on a node": f"{new_a_second * given.first_byte_seconds:.0f}",
        "cache of a node, 3 windows without lanes": size(
            min(whole / given.tasks, 3 * 16 * given.shard_bytes)
        ),
        "cache of a node, 3 windows in lanes": size(
            min(whole / given.tasks, 3 * given.gpus_a_node * given.shard_bytes)
        ),
        "index of a task in a worker, without": size(pairs / given.tasks * found.index_bytes),
        "index of a task in a worker, in lanes": size(
            pairs / given.tasks / gpus * found.index_bytes
        ),
    }
    for link in given.links_gbit:
        for name, count in (("without", whole), ("in lanes", laned)):
            rows[f"fetching at {link} Gbit/s, {name}"] = duration(count * 8 / (link * 1e9))
    return rows


def size(count: float) -> str:
    """Return bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def duration(seconds: float) -> str:
    """Return seconds as a person says them."""
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.2g} s"


if __name__ == "__main__":
    main()
