"""Readers of JPEG shards against each other: samples per second of processor time.

    python -m tests.benchmarks.data                   # all of it
    python -m tests.benchmarks.data --only memory     # or: readers, start, memory

Every measurement is a process of its own; in each round all arms take their turn, and ratios are
made inside a round. litdata is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.data_loops import ARMS, write_pictures
from tests.benchmarks.data_scale import memory, start

WORKERS = (0, 1, 2)
AGAINST = {
    "mmcl, Pillow": ("webdataset", 1.15),
    "mmcl": ("webdataset", 2.0),
    "mmcl ": ("bare decoding", None),
    "mmcl, steady": ("bare decoding", 0.95),
    "litdata": ("webdataset", None),
    "mmcl  ": ("litdata", None),
}
"""Arm -> the one it is measured against, and what is wanted; blanks tell rows of one arm apart."""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000, help="pictures of 224 x 224")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=("readers", "start", "memory"))
    parser.add_argument("--millions", type=int, default=10, help="samples of the memory row")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(ARMS[given.arm](given.folder, given.workers))
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "readers", "start"):
            write_pictures(Path(folder), given.samples)
        if given.only in (None, "readers"):
            readers(Path(folder), given.rounds)
        if given.only in (None, "start"):
            print(start(Path(folder)))
        if given.only in (None, "memory"):
            print(memory(Path(folder) / "many", given.millions))


def readers(folder: Path, rounds: int) -> None:
    """Print ratios of samples per second of processor time, median (smallest to largest)."""
    arms = [arm for arm in ARMS if _rate(folder, arm, 0) is not None]
    print("| what | against | " + " | ".join(f"{w} workers" for w in WORKERS) + " | wanted |")
    print("|---|---|" + "---|" * len(WORKERS) + "---|")
    rates = {(arm, workers): [] for arm in arms for workers in WORKERS}
    for turn in range(rounds):
        for workers in WORKERS:
            # The order turns round, so that no arm is always behind the same one.
            for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                rates[arm, workers].append(_rate(folder, arm, workers))
    for name, (other, wanted) in AGAINST.items():
        if name.strip() in arms and other in arms:
            cells = []
            for workers in WORKERS:
                # Decoding alone has no workers.
                base = rates[other, 0 if other == "bare decoding" else workers]
                ratio = np.array(rates[name.strip(), workers]) / np.array(base)
                cells.append(f"{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})")
            aim = "" if wanted is None else f"at least {wanted:.2f}"
            print(f"| {name.strip()} | {other} | {' | '.join(cells)} | {aim} |", flush=True)


def _rate(folder: Path, arm: str, workers: int) -> float | None:
    """Run one arm in a process of its own; None where what it needs is not installed."""
    words = ["--arm", arm, "--folder", str(folder), "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.data", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout.strip().splitlines()[-1]
    return None if said == "None" else float(said)


if __name__ == "__main__":
    main()
