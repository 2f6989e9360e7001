"""References: old samples by name, to be read again from their shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.core.randomness import ranks_of
from mmcl.memory.selection import lowest

Policy = Literal["reservoir", "balanced"]

_CHUNK = 1 << 20
_COLUMNS = ("task", "sample", "labels")


class References(nn.Module):
    """A bounded set of (task, sample) numbers.

    What is held is a function of everything ever offered, whatever the order or the grouping: the
    entries whose hash of (seed, task, sample) is smallest. So all ranks hold the same set without
    a word between them, and nothing else has to be remembered to go on.

    Args:
        capacity: samples held at most; 0 or None = all.
        policy: "reservoir" = a uniform sample of everything offered, "balanced" = equally many of
            every class (a small class leaves its rest to the others).
        seed: of the choice.

    **Remembers** 24 bytes per sample: task, sample, label, all int64 on the CPU.
    **Asks of the model** nothing.
    """

    def __init__(
        self, capacity: int | None = None, policy: Policy = "reservoir", seed: int = 0
    ) -> None:
        super().__init__()
        if policy not in ("reservoir", "balanced"):
            raise ValueError(f"policy is '{policy}': choose 'reservoir' or 'balanced'")
        if capacity is not None and capacity < 0:
            raise ValueError(f"capacity is {capacity}: give 1 or more samples, or 0 for all")
        self.capacity = capacity or 0
        self.policy = policy
        self.seed = seed
        self._columns = {name: torch.zeros(0, dtype=torch.int64) for name in _COLUMNS}
        self._ranks = torch.zeros(0, dtype=torch.int64)

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

    def __len__(self) -> int:
        """Return R, the number of samples held."""
        return len(self.task)

    def __bool__(self) -> bool:
        """Return True: an empty store is still a module; ask ``len``."""
        return True

    def offer(self, task: int, samples: Tensor, labels: Tensor | None = None) -> None:
        """Offer samples of a task; one that was offered before is not counted twice.

        Args:
            task: index of the task.
            samples: (R,) int64 numbers inside the task.
            labels: (R,) int64 classes; needed by "balanced".

        Raises:
            ValueError: if "balanced" is given no labels, or not one for each sample.
        """
        if labels is None and self.policy == "balanced":
            raise ValueError(
                "policy is 'balanced' and labels is None: give the class of every sample, "
                "or choose policy='reservoir'"
            )
        if labels is not None and labels.shape != samples.shape:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and samples {tuple(samples.shape)}: "
                "give one class for each sample"
            )
        samples = samples.cpu()
        labels = torch.full_like(samples, -1) if labels is None else labels.cpu()
        # In pieces, so that a task of a hundred million samples does not need them all at once.
        for start in range(0, len(samples), _CHUNK):
            piece, classes = samples[start : start + _CHUNK], labels[start : start + _CHUNK]
            columns = {"task": torch.full_like(piece, task), "sample": piece, "labels": classes}
            self._admit(columns, ranks_of(self.seed, task, piece))

    def _admit(self, columns: Mapping[str, Tensor], ranks: Tensor) -> None:
        joined = {name: torch.cat([self._columns[name], columns[name]]) for name in _COLUMNS}
        ranks = torch.cat([self._ranks, ranks])
        order = torch.argsort(joined["sample"], stable=True)
        order = order[torch.argsort(joined["task"][order], stable=True)]
        names = torch.stack([joined["task"], joined["sample"]], 1)[order]
        is_first = torch.ones(len(order), dtype=torch.bool)
        is_first[1:] = (names[1:] != names[:-1]).any(1)
        order = order[is_first]
        if self.capacity:
            groups = joined["labels"][order] if self.policy == "balanced" else None
            order = order[lowest(ranks[order], self.capacity, groups).sort().values]
        self._columns = {name: column[order] for name, column in joined.items()}
        self._ranks = ranks[order]

    def get_extra_state(self) -> dict[str, Any]:
        """Return what is held as plain tensors."""
        return dict(self._columns)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Hold what a checkpoint held."""
        columns = {name: state[name].cpu() for name in _COLUMNS}
        ranks = torch.zeros_like(columns["task"])
        for task in columns["task"].unique().tolist():
            own = columns["task"] == task
            ranks[own] = ranks_of(self.seed, task, columns["sample"][own])
        self._columns = {name: torch.zeros(0, dtype=torch.int64) for name in _COLUMNS}
        self._ranks = torch.zeros(0, dtype=torch.int64)
        self._admit(columns, ranks)
