"""Recall: which old samples the next task's loader mixes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Keep = Literal["references", "copies", "none"]


@dataclass(frozen=True)
class Recall:
    """Old samples, named by (task, sample), and how often they come.

    Attributes:
        task: (R,) int64, the task of each sample.
        sample: (R,) int64, its number inside that task.
        share: part of every global batch, 0 < share < 1, given to recalled rows: exactly
            ``round(share * global_batch)`` slots, at least 1. None = every recalled sample is
            visited once in an epoch, shuffled among the new ones (joint training).
        keep: "references" reads them from the old shards, "copies" from shards written under the
            run's ``memory/``; "none" makes any look at a finished task an error.
    """

    task: Tensor
    sample: Tensor
    share: float | None = None
    keep: Keep = "references"

    def __post_init__(self) -> None:
        if self.task.shape != self.sample.shape or self.task.dim() != 1:
            raise ValueError(
                f"task has shape {tuple(self.task.shape)} and sample {tuple(self.sample.shape)}: "
                "give one number of each for every recalled sample"
            )
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(
                f"share is {self.share}, expected more than 0 and less than 1: "
                "it is the part of each batch that old samples take"
            )

    def __len__(self) -> int:
        """Return R, the number of recalled samples."""
        return int(self.task.shape[0])
