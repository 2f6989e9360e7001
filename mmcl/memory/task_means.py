"""TaskMeans: what the rows of each task look like on average, as exact sums over a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core import VLM, Batch, Modality, Task, require
from mmcl.core.distributed import sum_over_ranks
from mmcl.memory.snapshot import Snapshot

Features = tuple[Tensor, ...]


class TaskMeans(nn.Module):
    """Sums of unit embeddings, one row for each task; a mean points the way its sum does.

    Args:
        modalities: what is embedded, of "image" and "text".

    **Remembers** E float64 numbers for each task and modality, and a count of rows.

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
    def learn(
        self,
        model: VLM,
        task: Task,
        batches: Iterable[Batch],
        by: object,
        watch: Callable[[Batch, Features], None] = lambda batch, features: None,
    ) -> None:
        """Take the sums of a task from one exact pass, over all ranks.

        Args:
            model: that embeds.
            task: whose row is written.
            batches: this rank's part of the pass.
            by: the strategy, for errors.
            watch: sees every batch and its features as well.

        Raises:
            RuntimeError: if this process has no rows.
        """
        sums: list[Tensor] | None = None
        rows = torch.zeros((), dtype=torch.int64)
        for batch in batches:
            features = self.features(model, batch, by)
            own = [seen.sum(0) for seen in features]
            sums = own if sums is None else [a + b for a, b in zip(sums, own, strict=True)]
            rows = rows.to(own[0].device) + len(batch)
            watch(batch, features)
        if sums is None:
            raise RuntimeError(
                f"{type(by).__name__} saw no rows of task '{task.name}' on this process: give "
                "end_task the task's training batches, or use fewer processes"
            )
        table = {"counts": _with_row(self.table, "counts", task.index, sum_over_ranks(rows))}
        for modality, total in zip(self.modalities, sums, strict=True):
            table[modality] = _with_row(self.table, modality, task.index, sum_over_ranks(total))
        self.table.take(table)

    @property
    def counts(self) -> Tensor:
        """(T,) int64 rows behind each task, 0 for a task that was passed over."""
        tensors = self.table.tensors
        return tensors["counts"] if tensors else torch.zeros(0, dtype=torch.int64)

    @property
    def sums(self) -> Features:
        """(T, E) float64 of each modality."""
        return tuple(self.table.get(modality) for modality in self.modalities)

    @property
    def is_empty(self) -> bool:
        """Whether no task has ended yet."""
        return self.table.is_empty

    def knows(self, task: int) -> bool:
        """Tell whether a task has ended."""
        return 0 <= task < len(self.counts) and bool(self.counts[task])


def _with_row(table: Snapshot, name: str, place: int, row: Tensor) -> Tensor:
    old = table.tensors.get(name)
    known = 0 if old is None else len(old)
    new = row.new_zeros(max(place + 1, known), *row.shape)
    if old is not None:
        new[:known] = old
    new[place] = row
    return new
