"""Order of remote shards in lanes, so that every device reads shards of its own.

A lane is a range of a task's samples in the order of the card, the same in every epoch. Of the new
samples of a global batch, number p comes from lane ``p % lanes``. Rank r of W takes the numbers p
with ``p % W == r``, so where ``lanes`` is a multiple of W it reads the lanes r, r + W, ... and no
other, and its node fetches only their shards. With any other W the global batches are the same and
several ranks read a lane, which costs fetches.

Lanes differ by one sample a batch at most, and a shard at the edge of two lanes is cut: each reads
its own samples of it. So every sample comes once an epoch. mosaicml-streaming divides samples in
the same way (``num_canonical_nodes``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from mmcl.core.seeding import hash_seed
from mmcl.data.batches.batch_plan import EpochPlan, WindowedShuffle
from mmcl.data.remote.cache import CachedFile
from mmcl.data.shards.reader import Reader
from mmcl.data.stored_sample import IntArray


def lanes_of_rank(lanes: int, rank: int, world: int) -> range:
    """Return the lanes that one of ``world`` ranks reads."""
    return range(rank % math.gcd(lanes, world), lanes, math.gcd(lanes, world))


class Lanes:
    """Division of a task's samples into lanes, each a range of sample numbers.

    Args:
        count: L, number of lanes.
        samples: number of samples.
        steps: global batches of an epoch; batch i begins at sample ``i * samples // steps``.

    Attributes:
        edges: (L + 1,) int64, lane l holds the samples ``edges[l]`` to ``edges[l + 1]`` - 1.
    """

    def __init__(self, count: int, samples: int, steps: int) -> None:
        self.count, self.samples, self.steps = count, samples, max(1, steps)
        sizes = self.used(np.full(count, self.steps), np.arange(count))
        self.edges: IntArray = np.concatenate([[0], np.cumsum(sizes)])

    def used(self, batches: IntArray, lanes: IntArray) -> IntArray:
        """Return (R,) samples that the first ``batches`` (R,) batches take from ``lanes`` (R,)."""
        smaller = self.samples // self.steps
        larger = self._start(batches) - batches * smaller  # batches of one sample more
        missing = self.count - 1 - lanes
        of_smaller, of_larger = (smaller + missing) // self.count, (smaller + 1 + missing)
        counts: IntArray = (batches - larger) * of_smaller + larger * (of_larger // self.count)
        return counts

    def places(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Return (R,) the lane, and (R,) the index in it, of each sample of an epoch's sequence.

        Args:
            start: first index in the sequence of an epoch's batches.
            stop: index behind the last.
        """
        indices = np.arange(start, stop)
        batches = ((indices + 1) * self.steps - 1) // max(1, self.samples)
        offsets = indices - self._start(batches)
        lanes = offsets % self.count
        return lanes, self.used(batches, lanes) + offsets // self.count

    def numbers(self, lanes: Sequence[int]) -> IntArray:
        """Return the numbers of all samples of some lanes, rising."""
        ranges = [np.arange(self.edges[lane], self.edges[lane + 1]) for lane in lanes]
        return np.concatenate(ranges)

    def _start(self, batches: IntArray) -> IntArray:
        start: IntArray = batches * self.samples // self.steps
        return start


def expect_lanes(lanes: int | None, global_batch_size: int) -> int | None:
    """Return ``data.shuffle_lanes``, checked.

    Raises:
        ValueError: if a global batch cannot take a sample from every lane.
    """
    if lanes is not None and not 1 <= lanes <= global_batch_size:
        raise ValueError(
            f"data.shuffle_lanes is {lanes}, expected 1 to data.global_batch_size "
            f"({global_batch_size}): a batch takes a sample from every lane"
        )
    return lanes


def lanes_warning(
    lanes: int | None, task: str, world: int, *, nodes: int, is_joint: bool, is_remote: bool
) -> str:
    """Return why lanes have no effect, or several nodes fetch the same remote shards; "" if not.

    Args:
        lanes: ``data.shuffle_lanes``.
        task: name of the task.
        world: number of processes.
        nodes: number of nodes.
        is_joint: whether old samples are shuffled among the new ones.
        is_remote: whether the task has remote shards.
    """
    if not is_remote and (lanes or 1) > 1:
        return (
            f"data.shuffle_lanes is {lanes} and has no effect on task '{task}', whose shards are "
            "local and shuffled as a whole"
        )
    if lanes == 1 or nodes == 1 or not is_remote:
        return ""
    if is_joint:
        reason = "old samples are shuffled among new ones: keep its shards on a file system"
    elif lanes is None:
        reason = (
            f"data.shuffle_lanes is not set: start a run with {world}, or another multiple of the "
            "devices, or with 1 if the nodes share data.cache_dir"
        )
    elif lanes % world:
        reason = (
            f"data.shuffle_lanes is {lanes}, no multiple of {world} devices: the batches are those "
            "of any other number, and a number that divides it fetches less"
        )
    else:
        return ""
    return f"several nodes fetch the same shards of task '{task}', {reason}"


class LanedShuffle:
    """Permutation of the samples of an epoch, each lane in an order of its own.

    Inside a lane, its parts of shards come in random order and samples are shuffled within windows
    of them.

    Args:
        seed: seed of the permutation.
        sizes: samples of each shard; numbers count through the shards in this order.
        window: shards whose samples are shuffled together, over all lanes; at least one in each.
        lanes: division of these samples.
        own: lanes of this rank, whose shards ``window`` returns.
    """

    def __init__(
        self, seed: int, sizes: IntArray, window: int, *, lanes: Lanes, own: Sequence[int]
    ) -> None:
        self.seed, self.lanes, self.own = seed, lanes, own
        self._window = -(-window // lanes.count)
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._shuffle = cache(self._shuffled_lane)

    def slice(self, start: int, stop: int) -> IntArray:
        """Return the numbers at indices ``start`` to ``stop`` - 1."""
        lanes, indices = self.lanes.places(start, min(stop, self.lanes.samples))
        order = np.argsort(lanes, kind="stable")
        ends = np.cumsum(np.bincount(lanes, minlength=self.lanes.count))
        numbers, begin = np.empty_like(indices), 0
        for lane, end in enumerate(ends.tolist()):
            if begin < end:
                # Consecutive indices of a sequence take consecutive samples of a lane.
                first, last = int(indices[order[begin]]), int(indices[order[end - 1]])
                taken = self._shuffle(lane)[1].slice(first, last + 1)
                numbers[order[begin:end]] = taken + self.lanes.edges[lane]
            begin = end
        return numbers

    def window(self, index: int, ahead: int = 0) -> IntArray:
        """Return the shards of the own lanes' windows at an index, or of those after them."""
        batch = ((index + 1) * self.lanes.steps - 1) // max(1, self.lanes.samples)
        own = np.asarray(self.own, dtype=np.int64)
        used = self.lanes.used(np.full(len(own), batch), own)
        found = [np.zeros(0, dtype=np.int64)]
        for lane, done in zip(own.tolist(), used.tolist(), strict=True):
            first, shuffle = self._shuffle(lane)
            found.append(first + shuffle.window(done, ahead))
        return np.unique(np.concatenate(found))

    def _shuffled_lane(self, lane: int) -> tuple[int, WindowedShuffle]:
        """Return the first shard of a lane and the permutation of the lane's samples."""
        start, end = self.lanes.edges[lane : lane + 2]
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left"))
        sizes = np.diff(np.clip(self._starts[first : last + 1], start, end))
        return first, WindowedShuffle(hash_seed(self.seed, lane), sizes, self._window)


class ShardPrefetcher:
    """Prefetches remote shards one window before their samples are read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._now: set[int] = set()
        self._ahead: set[int] = set()

    def __call__(self, plan: EpochPlan, step: int) -> None:
        """Fetch the shards of the window in which a batch begins, and of the one after it."""
        if not isinstance(plan.order, WindowedShuffle | LanedShuffle):
            return
        index = plan.mixture.start_of(step)
        now, ahead = (set(plan.order.window(index, ahead=n).tolist()) for n in (0, 1))
        # Shards of a window that begins count as used then, so that the cache evicts older ones.
        for number in (*sorted(now - self._now), *sorted(ahead - self._ahead)):
            origin = getattr(self.reader.shards[number], "origin", None)
            if isinstance(origin, CachedFile):
                origin.prefetch()
        self._now, self._ahead = now, ahead
