"""References: old samples by name, to be read again from their shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.core.randomness import ranks_of
from mmcl.memory.selection import lowest, lowest_of_range

Balance = Literal["reservoir", "balanced"]

_CHUNK = 1 << 20
_COLUMNS = ("task", "sample", "labels", "bytes", "order")
_NO_BOUND = torch.iinfo(torch.int64).max
_PLACE_BITS, _MOST_PLACES = 40, 1 << 22


class References(nn.Module):
    """A bounded set of (task, sample) numbers.

    Samples that are offered without places are held by hash: those whose hash of (seed, task,
    sample) is smallest. Then what is held is a function of everything ever offered, whatever the
    order or the grouping, so all ranks hold the same set without a word between them. Samples
    offered with places (the order of a herding, say) are held in that order, so that a memory that
    has to shrink keeps a beginning of every list.

    Args:
        capacity: samples held at most; 0 or None = not bounded by samples.
        policy: "reservoir" = a uniform sample of everything offered, "balanced" = equally many of
            every class, and of every task of samples without one (a small class leaves its rest to
            the others).
        seed: of the choice.
        capacity_bytes: bytes held at most, 0 = not bounded by bytes; with both, both hold. The
            samples that were to be held are taken up to the first that does not fit; one that
            would never fit is passed over, and large ones are a little rarer for it.
        by_task: share the room equally between tasks first.

    **Remembers** 40 bytes per sample: task, sample, label, bytes, order, all int64 on the CPU.
    **Asks of the model** nothing.
    """

    def __init__(
        self,
        capacity: int | None = None,
        policy: Balance = "reservoir",
        seed: int = 0,
        *,
        capacity_bytes: int = 0,
        by_task: bool = False,
    ) -> None:
        super().__init__()
        if policy not in ("reservoir", "balanced"):
            raise ValueError(f"policy is '{policy}': choose 'reservoir' or 'balanced'")
        if capacity is not None and capacity < 0:
            raise ValueError(f"capacity is {capacity}: give 1 or more samples, or 0 for all")
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}: give 1 or more, or 0 for all")
        self.capacity = capacity or 0
        self.capacity_bytes = capacity_bytes
        self.policy = policy
        self.by_task = by_task
        self.seed = seed
        self._columns = {name: torch.zeros(0, dtype=torch.int64) for name in _COLUMNS}
        # What did not fit is never to be held later, else small samples would creep in behind it.
        self._bound = _NO_BOUND

    @property
    def task(self) -> Tensor:
        """(R,) int64, the task of each sample held."""
        return self._columns["task"]

    @property
    def sample(self) -> Tensor:
        """(R,) int64, its number inside the task; entries stand in order of (task, sample)."""
        return self._columns["sample"]

    @property
    def labels(self) -> Tensor:
        """(R,) int64, its class, -1 where none was given."""
        return self._columns["labels"]

    @property
    def bytes(self) -> Tensor:
        """(R,) int64, what it takes on disk, -1 where that was not given."""
        return self._columns["bytes"]

    @property
    def order(self) -> Tensor:
        """(R,) int64, the smallest of a task (or of a class of it) stays longest."""
        return self._columns["order"]

    def __len__(self) -> int:
        """Return R, the number of samples held."""
        return len(self.task)

    def __bool__(self) -> bool:
        """Return True: an empty store is still a module; ask ``len``."""
        return True

    def room(self, sizes: Tensor) -> int:
        """Return how many of some samples could be held at most.

        Args:
            sizes: (R,) int64 bytes of each; not looked at unless bytes are bounded.
        """
        most = min(len(sizes), self.capacity or len(sizes))
        if self.capacity_bytes:
            fitting = sizes.cpu().sort().values.cumsum(0) <= self.capacity_bytes
            most = min(most, int(fitting.sum()))
        return most

    def offer_range(self, task: int, size: int) -> None:
        """Offer the samples 0 to size - 1 of a task, which need not fit into main memory.

        Raises:
            ValueError: if classes or bytes would have to be known: use ``offer``.
        """
        if self.policy == "balanced" or self.capacity_bytes:
            raise ValueError(
                "policy is 'balanced' or bytes are bounded: offer samples with classes and sizes"
            )
        bound = self._largest() if not self.by_task else _NO_BOUND
        self.offer(task, lowest_of_range(size, self.capacity, self.seed, task, bound=bound))

    def offer(
        self,
        task: int,
        samples: Tensor,
        labels: Tensor | None = None,
        *,
        sizes: Tensor | None = None,
        places: Tensor | None = None,
    ) -> None:
        """Offer samples of a task; one that was offered before is not counted twice.

        Args:
            task: index of the task.
            samples: (R,) int64 numbers inside the task.
            labels: (R,) int64 classes, -1 = none; needed by "balanced".
            sizes: (R,) int64 bytes of each; needed where bytes are bounded.
            places: (R,) int64 place of each sample in its list, 0 = the last to leave; None = by
                hash, which also decides between equal places.

        Raises:
            ValueError: if "balanced" is given no labels, a bound of bytes no sizes, or something
                is not given for each sample; or if nothing offered could ever fit.
        """
        if labels is None and self.policy == "balanced":
            raise ValueError(
                "policy is 'balanced' and labels is None: give the class of every sample, "
                "or choose policy='reservoir'"
            )
        _expect_one_each(samples, {"labels": labels, "sizes": sizes, "places": places})
        samples = samples.cpu()
        unknown = torch.full((), -1).expand(len(samples))
        labels = unknown if labels is None else labels.cpu()
        sizes = unknown if sizes is None else sizes.cpu()
        self._expect_sizes(sizes)
        # In pieces, so that a task of a hundred million samples does not need them all at once.
        for start in range(0, len(samples), _CHUNK):
            part = slice(start, start + _CHUNK)
            ranks = ranks_of(self.seed, task, samples[part])
            if places is not None:
                ranks = _with_place(ranks, places[part].cpu())
            named = {"task": torch.full_like(ranks, task), "sample": samples[part]}
            rest = {"labels": labels[part], "bytes": sizes[part], "order": ranks}
            self._admit({**named, **rest})

    def _expect_sizes(self, sizes: Tensor) -> None:
        if not self.capacity_bytes or not len(sizes):
            return
        if bool((sizes < 0).any()):
            raise ValueError(
                "memory is bounded by bytes and the size of some samples is not known: bound it "
                "by samples, or give batches whose loader states Batch.bytes"
            )
        if int(sizes.min()) > self.capacity_bytes:
            raise ValueError(
                f"the smallest sample offered takes {int(sizes.min())} bytes and "
                f"{self.capacity_bytes} may be held: give the memory more"
            )

    def _largest(self) -> int:
        """Return the rank from which on nothing new would be held, whatever else is offered."""
        is_full = self.capacity and len(self) == self.capacity
        return min(self._bound, int(self.order.max()) if is_full else _NO_BOUND)

    def _admit(self, columns: Mapping[str, Tensor]) -> None:
        is_open = torch.ones(len(columns["order"]), dtype=torch.bool)
        if self.capacity_bytes:
            is_open &= columns["bytes"] <= self.capacity_bytes
        if self.policy == "reservoir" and not self.by_task:
            is_open &= columns["order"] < self._largest()
        joined = {n: torch.cat([self._columns[n], columns[n][is_open]]) for n in _COLUMNS}
        order = torch.argsort(joined["sample"], stable=True)
        order = order[torch.argsort(joined["task"][order], stable=True)]
        names = torch.stack([joined["task"], joined["sample"]], 1)[order]
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = (names[1:] != names[:-1]).any(1)
        order = order[is_first]
        named = {name: column[order] for name, column in joined.items()}
        kept = self._kept(named)
        self._columns = {name: column[kept] for name, column in named.items()}

    def _kept(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the places of the rows that stay, rising."""
        ranks, tasks = columns["order"], columns["task"]
        groups = None
        if self.policy == "balanced":
            groups = torch.where(columns["labels"] >= 0, columns["labels"], -1 - tasks)
            if self.by_task:
                groups = groups + (tasks << 32)
        capacity = self.capacity or len(ranks)
        if not self.by_task:
            order = lowest(ranks, len(ranks) if self.capacity_bytes else capacity, groups)
        else:
            turns = torch.empty_like(ranks)
            turns[lowest(ranks, len(ranks), groups)] = torch.arange(len(ranks))
            order = lowest(turns, len(ranks), tasks)
        order = order[:capacity]
        if self.capacity_bytes:
            fits = columns["bytes"][order].cumsum(0) <= self.capacity_bytes
            if self.policy == "reservoir" and not self.by_task and not bool(fits.all()):
                self._bound = int(ranks[order[~fits][0]])
            order = order[fits]
        return order.sort().values

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is held as plain tensors."""
        return {**self._columns, "bound": self._bound}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Hold what a checkpoint held."""
        self._columns = {name: state[name].cpu() for name in _COLUMNS}
        self._bound = int(state["bound"])


def _expect_one_each(samples: Tensor, given: Mapping[str, Tensor | None]) -> None:
    for name, column in given.items():
        if column is not None and column.shape != samples.shape:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)} and samples {tuple(samples.shape)}: "
                "give one for each sample"
            )


def _with_place(ranks: Tensor, places: Tensor) -> Tensor:
    """Put the place of each sample in front of its hash."""
    if len(places) and int(places.max()) >= _MOST_PLACES:
        raise ValueError(
            f"a list of {int(places.max()) + 1} samples was offered, {_MOST_PLACES} are the most "
            "that can be ordered: give a smaller pool"
        )
    return (places << _PLACE_BITS) | (ranks >> (63 - _PLACE_BITS))
