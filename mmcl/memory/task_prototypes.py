"""Task prototypes: mean embeddings of each task's samples, as exact sums over a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import VLM, Batch, Modality, Task, require
from mmcl.core.distributed import all_reduce_sum
from mmcl.memory.snapshot import Snapshot

Features = tuple[Tensor, ...]


class TaskPrototypes(nn.Module):
    """Task prototypes as sums of unit embeddings; a mean has the direction of its sum.

    Args:
        modalities: that are embedded, of "image" and "text".

    **Remembers** E float64 numbers for each task and modality, and a count of samples.

    **Asks of the model** ``embed``.
    """

    def __init__(self, modalities: Sequence[Modality] = ("image", "text")) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        self.table = Snapshot()

    def features(self, model: VLM, batch: Batch, by: object) -> Features:
        """Return (B, E) unit embeddings of each modality, without gradient."""
        able = require(model, "embed", by=by)
        found = [able.embed(batch, modality).detach() for modality in self.modalities]
        return tuple(functional.normalize(seen.double(), dim=1) for seen in found)

    @torch.no_grad()
    def fit(
        self,
        model: VLM,
        task: Task,
        batches: Iterable[Batch],
        by: object,
        watch: Callable[[Batch, Features], None] = lambda batch, features: None,
    ) -> None:
        """Compute the sums of a task from one exact pass, over all ranks.

        Args:
            model: that embeds.
            task: of the samples.
            batches: this rank's stride of the pass.
            by: the strategy, for errors.
            watch: called with every batch and its features.

        Raises:
            RuntimeError: if this process has no samples.
        """
        sums: list[Tensor] | None = None
        count = torch.zeros((), dtype=torch.int64)
        for batch in batches:
            features = self.features(model, batch, by)
            own = [seen.sum(0) for seen in features]
            sums = own if sums is None else [a + b for a, b in zip(sums, own, strict=True)]
            count = count.to(own[0].device) + len(batch)
            watch(batch, features)
        if sums is None:
            raise RuntimeError(
                f"{type(by).__name__} saw no samples of task '{task.name}' on this process: give "
                "end_task the task's training batches, or use fewer processes"
            )
        table = {"counts": self.table.with_row("counts", task.index, all_reduce_sum(count))}
        for modality, total in zip(self.modalities, sums, strict=True):
            table[modality] = self.table.with_row(modality, task.index, all_reduce_sum(total))
        self.table.take(table)

    @property
    def counts(self) -> Tensor:
        """Number of samples of each task, (T,) int64, 0 for a task that was skipped."""
        tensors = self.table.tensors
        return tensors["counts"] if tensors else torch.zeros(0, dtype=torch.int64)

    @property
    def sums(self) -> Features:
        """Sums of each task's embeddings, (T, E) float64 for each modality."""
        return tuple(self.table.get(modality) for modality in self.modalities)

    @property
    def is_empty(self) -> bool:
        """Whether no task has ended yet."""
        return self.table.is_empty

    def has(self, task: int) -> bool:
        """Whether a task has ended."""
        return 0 <= task < len(self.counts) and bool(self.counts[task])
