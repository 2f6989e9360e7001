"""Replay index: references to old samples, which are read again from their shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.core.seeding import hash_priorities
from mmcl.memory.selection import smallest_priorities, smallest_priorities_in_range

Balance = Literal["reservoir", "class_balanced"]

_CHUNK = 1 << 20
_COLUMNS = ("task_ids", "sample_ids", "labels", "num_bytes", "priority")
_NO_BOUND = torch.iinfo(torch.int64).max
_HASH_BITS, _MAX_POSITIONS = 40, 1 << 22


class ReplayIndex(nn.Module):
    """Replay index: a bounded set of references (task, sample id).

    Samples that are offered without positions are kept by hash: those whose hash of (seed, task,
    sample id) is smallest. Then the content is a function of everything ever offered, in any order
    or grouping, so all ranks hold the same set without communication. Samples offered with
    positions (the order of herding, say) are kept in that order: an index that shrinks keeps a
    prefix of every list.

    Args:
        capacity: samples held at most; 0 or None = not bounded by samples.
        selection: "reservoir" = a uniform sample of everything offered, "class_balanced" = equally
            many of every class, and of every task of samples without one (a small class leaves its
            remainder to the others).
        seed: seed of the selection.
        capacity_bytes: bytes held at most, 0 = not bounded by bytes; with both, both hold. Samples
            are kept in order up to the first that does not fit; one larger than the whole capacity
            is skipped, so large samples are slightly rarer.
        by_task: divide the capacity equally between tasks first.

    **Remembers** 40 bytes per sample: task, sample id, label, bytes, priority: int64 on the CPU.
    **Asks of the model** nothing.
    """

    def __init__(
        self,
        capacity: int | None = None,
        selection: Balance = "reservoir",
        seed: int = 0,
        *,
        capacity_bytes: int = 0,
        by_task: bool = False,
    ) -> None:
        super().__init__()
        if selection not in ("reservoir", "class_balanced"):
            raise ValueError(f"selection is '{selection}': choose 'reservoir' or 'class_balanced'")
        if capacity is not None and capacity < 0:
            raise ValueError(f"capacity is {capacity}: give 1 or more samples, or 0 for all")
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes is {capacity_bytes}: give 1 or more, or 0 for all")
        self.capacity = capacity or 0
        self.capacity_bytes = capacity_bytes
        self.selection = selection
        self.by_task = by_task
        self.seed = seed
        self._columns = {name: torch.zeros(0, dtype=torch.int64) for name in _COLUMNS}
        # What did not fit is never kept later, else small samples would be preferred.
        self._bound = _NO_BOUND

    @property
    def task_ids(self) -> Tensor:
        """Task of each sample held, (R,) int64."""
        return self._columns["task_ids"]

    @property
    def sample_ids(self) -> Tensor:
        """Sample id inside the task, (R,) int64; entries are sorted by (task, sample id)."""
        return self._columns["sample_ids"]

    @property
    def labels(self) -> Tensor:
        """Class of each sample held, (R,) int64, -1 where none was given."""
        return self._columns["labels"]

    @property
    def num_bytes(self) -> Tensor:
        """Bytes on disk of each sample held, (R,) int64, -1 where not given."""
        return self._columns["num_bytes"]

    @property
    def priority(self) -> Tensor:
        """Priority of each sample held, (R,) int64; the largest of its group is evicted first."""
        return self._columns["priority"]

    def __len__(self) -> int:
        """Return R, the number of samples held."""
        return len(self.task_ids)

    def __bool__(self) -> bool:
        """Return True: an empty index is still a module; use ``len``."""
        return True

    def remaining_capacity(self, sizes: Tensor) -> int:
        """Return the capacity for some samples of (R,) bytes: how many could be held at most."""
        most = min(len(sizes), self.capacity or len(sizes))
        if self.capacity_bytes:
            fitting = sizes.cpu().sort().values.cumsum(0) <= self.capacity_bytes
            most = min(most, int(fitting.sum()))
        return most

    def add_range(self, task: int, size: int) -> None:
        """Offer the samples 0 to size - 1 of a task, whose ids need not fit into main memory.

        Raises:
            ValueError: if classes or bytes are needed: use ``add``.
        """
        if self.selection == "class_balanced" or self.capacity_bytes:
            raise ValueError(
                "selection is 'class_balanced' or bytes are bounded: offer samples with classes "
                "and sizes"
            )
        bound = _NO_BOUND if self.by_task else self._largest()
        ids = smallest_priorities_in_range(size, self.capacity, self.seed, task, bound=bound)
        self.add(task, ids)

    def add(
        self,
        task: int,
        samples: Tensor,
        labels: Tensor | None = None,
        *,
        sizes: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """Offer samples of a task; one that was offered before is not counted twice.

        Args:
            task: index of the task.
            samples: (R,) int64 ids inside the task.
            labels: (R,) int64 classes, -1 = none; needed by "class_balanced".
            sizes: (R,) int64 bytes of each; needed where bytes are bounded.
            positions: (R,) int64 position of each sample in its list, 0 = the last to be evicted;
                None = by hash, which also breaks ties.

        Raises:
            ValueError: if "class_balanced" is given no labels, a bound of bytes no sizes, or
                something is not given for each sample; or if nothing offered could ever fit.
        """
        if labels is None and self.selection == "class_balanced":
            raise ValueError(
                "selection is 'class_balanced' and labels is None: give the class of every sample, "
                "or choose selection='reservoir'"
            )
        _expect_one_each(samples, {"labels": labels, "sizes": sizes, "positions": positions})
        samples = samples.cpu()
        unknown = torch.full((), -1).expand(len(samples))
        labels = unknown if labels is None else labels.cpu()
        sizes = unknown if sizes is None else sizes.cpu()
        self._expect_sizes(sizes)
        # In chunks, so that a task of a hundred million samples does not need them all at once.
        for start in range(0, len(samples), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            priorities = hash_priorities(self.seed, task, samples[chunk])
            if positions is not None:
                priorities = _with_position(priorities, positions[chunk].cpu())
            tasks = torch.full_like(priorities, task)
            columns = (tasks, samples[chunk], labels[chunk], sizes[chunk], priorities)
            self._admit(dict(zip(_COLUMNS, columns, strict=True)))

    def _expect_sizes(self, sizes: Tensor) -> None:
        if not self.capacity_bytes or not len(sizes):
            return
        if bool((sizes < 0).any()):
            raise ValueError(
                "the buffer is bounded by bytes and the size of some samples is not known: bound "
                "it by samples, or give batches whose loader states Batch.num_bytes"
            )
        if int(sizes.min()) > self.capacity_bytes:
            raise ValueError(
                f"the smallest sample offered takes {int(sizes.min())} bytes and "
                f"{self.capacity_bytes} may be held: give the buffer more"
            )

    def _largest(self) -> int:
        """Return the priority from which on no new sample would be kept, whatever is offered."""
        is_full = self.capacity and len(self) == self.capacity
        return min(self._bound, int(self.priority.max()) if is_full else _NO_BOUND)

    def _admit(self, columns: Mapping[str, Tensor]) -> None:
        is_open = torch.ones(len(columns["priority"]), dtype=torch.bool)
        if self.capacity_bytes:
            is_open &= columns["num_bytes"] <= self.capacity_bytes
        if self.selection == "reservoir" and not self.by_task:
            is_open &= columns["priority"] < self._largest()
        joined = {n: torch.cat([self._columns[n], columns[n][is_open]]) for n in _COLUMNS}
        order = torch.argsort(joined["sample_ids"], stable=True)
        order = order[torch.argsort(joined["task_ids"][order], stable=True)]
        ids = torch.stack([joined["task_ids"], joined["sample_ids"]], 1)[order]
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = (ids[1:] != ids[:-1]).any(1)
        order = order[is_first]
        unique = {name: column[order] for name, column in joined.items()}
        kept = self._kept(unique)
        self._columns = {name: column[kept] for name, column in unique.items()}

    def _kept(self, columns: Mapping[str, Tensor]) -> Tensor:
        """Return the rising indices of the samples to keep."""
        priorities, tasks = columns["priority"], columns["task_ids"]
        groups = None
        if self.selection == "class_balanced":
            groups = torch.where(columns["labels"] >= 0, columns["labels"], -1 - tasks)
            if self.by_task:
                groups = groups + (tasks << 32)
        count = len(priorities)
        order = smallest_priorities(priorities, count, groups)
        if self.by_task:
            turns = torch.empty_like(priorities)
            turns[order] = torch.arange(count)
            order = smallest_priorities(turns, count, tasks)
        order = order[: self.capacity or count]
        if self.capacity_bytes:
            fits = columns["num_bytes"][order].cumsum(0) <= self.capacity_bytes
            if self.selection == "reservoir" and not self.by_task and not bool(fits.all()):
                self._bound = int(priorities[order[~fits][0]])
            order = order[fits]
        return order.sort().values

    def get_extra_state(self) -> dict[str, Any]:
        """Return the references as plain tensors."""
        return {**self._columns, "bound": self._bound}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the references of a checkpoint."""
        self._columns = {name: state[name].cpu() for name in _COLUMNS}
        self._bound = int(state["bound"])


def _expect_one_each(samples: Tensor, given: Mapping[str, Tensor | None]) -> None:
    for name, column in given.items():
        if column is not None and column.shape != samples.shape:
            raise ValueError(
                f"{name} has shape {tuple(column.shape)} and samples {tuple(samples.shape)}: "
                "give one for each sample"
            )


def _with_position(priorities: Tensor, positions: Tensor) -> Tensor:
    """Return priorities ordered by position first, then by hash."""
    if len(positions) and int(positions.max()) >= _MAX_POSITIONS:
        raise ValueError(
            f"a list of {int(positions.max()) + 1} samples was offered, {_MAX_POSITIONS} are the "
            "most that can be ordered: give a smaller candidate_pool_size"
        )
    return (positions << _HASH_BITS) | (priorities >> (63 - _HASH_BITS))
