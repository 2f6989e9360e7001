"""What nodes fetch in an epoch of remote shards, with and without lanes: a server on loopback.

    python -m tests.benchmarks.remote_lanes

Every node has a cache of its own; its ranks read side by side in this process, node after node.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from mmcl.core import TaskStream
from mmcl.data import open_stream, train_loader
from mmcl.data.batches.lanes import lanes_of_rank
from tests.data.remote.test_remote_stream import wait_for_threads
from tests.data.small_stream import CutAndNoise, picture, write_tar
from tests.toys.http_server import Site, serving

SHARDS, EACH, GLOBAL_BATCH, WINDOW, DEVICES = 130, 48, 96, 16, 2
LANES = (1, 6, 8)


@dataclass(frozen=True)
class Stream:
    """A stream on a server: its card, and how many bytes and shards it has."""

    site: Site
    card: Path
    nbytes: int
    shard_bytes: int


def main() -> None:
    """Print the table."""
    os.environ["no_proxy"] = "*"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, serving() as site:
        stream = write(Path(name), site)
        print(
            f"{SHARDS} shards of {EACH} samples, {stream.nbytes / 1e6:.1f} MB; global batch "
            f"{GLOBAL_BATCH}, {DEVICES} devices a node, shuffle_window {WINDOW}\n"
        )
        print("| nodes | lanes | cache of a node | shards a node fetched | MB | in epoch 2 | MB |")
        print("|---|---|---|---|---|---|---|")
        for nodes in (1, 2, 4):
            for lanes in LANES:
                for windows in (None, 3):
                    print(measured(stream, Path(name), nodes, lanes, windows), flush=True)


def write(folder: Path, site: Site) -> Stream:
    """Put the shards on the server; pictures of noise have nearly equal sizes."""
    urls, nbytes, count = [], 0, 0
    for shard in range(SHARDS):
        members = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            members += [
                (f"{number:06d}.png", picture(number, size=(32, 32))),
                (f"{number:06d}.cls", str(number % 2).encode()),
            ]
        content = write_tar(folder / "x.tar", members).read_bytes()
        urls.append(site.put(f"/{shard:04d}.tar", content))
        nbytes, count = nbytes + len(content), max(count, len(content))
    test = site.put("/test.tar", content)
    counts = "".join(f"  {url}: {EACH}\n" for url in (*urls, test))
    card = folder / "far.yaml"
    card.write_text(
        f"name: far\nscenario: class\nclasses: [a, b]\ncounts:\n{counts}"
        f"tasks:\n- name: all\n  train: [{', '.join(urls)}]\n  test: {test}\n"
    )
    return Stream(site, card, nbytes, count)


def measured(stream: Stream, folder: Path, nodes: int, lanes: int, windows: int | None) -> str:
    """Read two epochs on every node; return a line of the table.

    A node's cache holds ``windows`` of each lane that it reads; None = all shards.
    """
    world = nodes * DEVICES
    own = len({lane for rank in range(DEVICES) for lane in lanes_of_rank(lanes, rank, world)})
    limit = windows and windows * own * -(-WINDOW // lanes) * stream.shard_bytes
    fetched: list[list[list[str]]] = [[], []]
    seen: list[list[str]] = [[], []]
    with tempfile.TemporaryDirectory(dir=folder) as caches:
        for node in range(nodes):
            prepared = open_stream(
                TaskStream.read(stream.card), cache_dir=Path(caches) / str(node), cache_limit=limit
            )
            for epoch in (0, 1):
                before = len(stream.site.asked)
                loaders = [
                    train_loader(
                        prepared, 0, CutAndNoise(), replay_plan=None,
                        global_batch_size=GLOBAL_BATCH, seed=0, window=WINDOW, lanes=lanes,
                        rank=node * DEVICES + device, world=world,
                        position=lambda epoch=epoch: (epoch, 0),
                    )
                    for device in range(DEVICES)
                ]  # fmt: skip
                for batches in zip(*loaders, strict=True):
                    seen[epoch] += [key for batch in batches for key in batch.keys]
                wait_for_threads()
                fetched[epoch].append([path for path, _ in stream.site.asked[before:]])
    for keys in seen:
        if len(keys) != len(set(keys)) or len(keys) != SHARDS * EACH:
            raise RuntimeError("an epoch did not hold every sample once")
    cells = [cell for paths in fetched for cell in counted(stream, paths)]
    cache = "all shards" if windows is None else f"{windows} windows"
    return f"| {nodes} | {lanes} | {cache} | {' | '.join(cells)} |"


def counted(stream: Stream, fetched: list[list[str]]) -> list[str]:
    """Return shards and MB that a node fetched, the fewest and the most."""
    counts = [len(paths) for paths in fetched]
    sizes = [sum(len(stream.site.contents[path]) for path in paths) / 1e6 for paths in fetched]
    spans = [(f"{min(counts)}", f"{max(counts)}"), (f"{min(sizes):.1f}", f"{max(sizes):.1f}")]
    return [low if low == high else f"{low} to {high}" for low, high in spans]


if __name__ == "__main__":
    main()
