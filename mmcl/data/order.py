"""Which samples make up which batch: a function of (seed, task, epoch, position), never a state.

A permutation sorts sample numbers by a hash of (seed, task, epoch, number), so it is the same on
every rank, in every process and with every version of torch.

Dealing: with W ranks and A accumulated parts, micro-batch a of rank r takes the rows
``a * W + r, a * W + r + W * A, ...`` of the global batch. So rank r sees rows r, r + W, ... of it,
and the ranks' micro-batches a together, row i of rank r at place i * W + r, keep its order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmcl.core.randomness import mix, ranks_of
from mmcl.data.shard import Numbers

_NEW, _RECALLED = 1, 2
"""What a permutation is for; keeps the two kinds of draws apart."""


@dataclass(frozen=True)
class EpochPlan:
    """All global batches of an epoch.

    Attributes:
        entries: (R,) rows of all batches, one batch after the other: a new sample's number, or
            ``new`` + the place of a recalled sample in its list.
        starts: (steps + 1,) where each batch begins in ``entries``.
        new: new samples of the task.
    """

    entries: Numbers
    starts: Numbers
    new: int

    def __len__(self) -> int:
        """Return the number of global batches."""
        return len(self.starts) - 1

    def batch(self, number: int) -> Numbers:
        """Return the entries of a global batch, new rows first."""
        return self.entries[self.starts[number] : self.starts[number + 1]]

    def micro_batch(
        self, number: int, *, part: int = 0, accumulation: int = 1, rank: int = 0, world: int = 1
    ) -> Numbers:
        """Return the entries that one rank takes in one accumulated part of a global batch."""
        return self.batch(number)[part * world + rank :: world * accumulation]


def replay_slots(recalled: int, share: float | None, global_batch: int) -> int:
    """Return how many rows of every global batch are recalled ones, 0 if none have a set place.

    Args:
        recalled: samples in the list.
        share: part of the batch; None = recalled samples are shuffled among the new ones.
        global_batch: rows of a batch over all ranks and accumulated parts.

    Raises:
        ValueError: if no row would be left for new samples.
    """
    if recalled == 0 or share is None:
        return 0
    slots = max(1, round(share * global_batch))
    if slots >= global_batch:
        raise ValueError(
            f"share {share} takes {slots} of the {global_batch} rows of a global batch and leaves "
            "none for new samples: use a smaller share or a larger global_batch"
        )
    return slots


def steps_per_epoch(new: int, recalled: int, share: float | None, global_batch: int) -> int:
    """Return the number of global batches that visit every new sample once."""
    slots = replay_slots(recalled, share, global_batch)
    once = new + (recalled if share is None else 0)
    return -(-once // (global_batch - slots))


def epoch_plan(
    new: int,
    *,
    global_batch: int,
    seed: int,
    task: int,
    epoch: int,
    recalled: int = 0,
    share: float | None = None,
) -> EpochPlan:
    """Lay out the global batches of an epoch.

    Every new sample comes exactly once, spread so that batches differ by one row at most. With a
    share, every batch ends with the same number of recalled rows, consecutive pieces of an endless
    row of permutations of the recalled list that goes on from epoch to epoch; without, the
    recalled samples are shuffled among the new ones and come once as well.

    Args:
        new: new samples of the task.
        global_batch: rows of a batch over all ranks and accumulated parts, at most.
        seed: of the run.
        task: index of the task.
        epoch: from 0.
        recalled: samples in the recalled list.
        share: part of every batch that recalled rows take, see ``Recall.share``.
    """
    slots = replay_slots(recalled, share, global_batch)
    steps = steps_per_epoch(new, recalled, share, global_batch)
    once = new + (recalled if share is None else 0)
    order = _permutation(mix(seed, task, _NEW, epoch), once)
    edges = np.arange(steps + 1, dtype=np.int64) * once // max(1, steps)
    batch_of = np.repeat(np.arange(steps, dtype=np.int64), np.diff(edges))
    if slots:
        drawn = _endless(seed, task, recalled, epoch * steps * slots, steps * slots) + new
        order = np.concatenate([order, drawn])
        batch_of = np.concatenate([batch_of, np.repeat(np.arange(steps), slots)])
        edges = edges + np.arange(steps + 1, dtype=np.int64) * slots
    # Stable, so that inside a batch each kind keeps its drawn order, new rows first.
    place = np.argsort(batch_of * 2 + (order >= new), kind="stable")
    return EpochPlan(order[place], edges, new)


def smallest_batch(new: int, recalled: int, share: float | None, global_batch: int) -> int:
    """Return the rows of the smallest global batch of an epoch."""
    steps = steps_per_epoch(new, recalled, share, global_batch)
    once = new + (recalled if share is None else 0)
    return once // steps + replay_slots(recalled, share, global_batch)


def _permutation(seed: int, count: int) -> Numbers:
    order: Numbers = ranks_of(seed, 0, torch.arange(count)).argsort(stable=True).numpy()
    return order


def _endless(seed: int, task: int, count: int, start: int, rows: int) -> Numbers:
    """Return places ``start`` to ``start + rows`` of the permutations of a list, put end to end."""
    first, last = start // count, -(-(start + rows) // count)
    keys = ranks_of(mix(seed, task, _RECALLED), 0, torch.arange(first * count, last * count))
    laid: Numbers = keys.view(-1, count).argsort(dim=1, stable=True).flatten().numpy()
    return laid[start - first * count :][:rows]
