"""RegLoRA adds a LoRA for each task and holds it back where earlier ones changed weights most.

Paper: Chen et al. 2025 (SEFE), arXiv:2505.02486; their Answer Style Diversification, which rewrites
the data, is left out.
Code followed: none; written from the equations.
Differs: older pairs stay beside the frozen weights instead of being merged into them, which is the
same function; places that several tasks chose count once; dropout, if any, is of all pairs' input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Output, Strategy, Task
from mmcl.layers import LowRankSlots, folded, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears, grow_slots
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.orthogonality import mean_of
from mmcl.ops.positions import largest, mean_size_at, pack_bits


class RegLoRA(Strategy):
    """One LoRA for each task on top of all before; where those were large, the new one stays small.

    A layer is ``W x + alpha / rank * sum of B_i A_i x``, of which the newest pair learns. When a
    task ends, the ``share`` largest entries of its |B A| are marked in every layer. From the
    second task on the loss has ``weight`` times the mean over layers of the mean of |B A|, of the
    new pair and without alpha / rank, over the marked entries.

    Merging the past into W would put a full copy of the weights into every checkpoint and change
    what ``fingerprint`` and remembered features rest on; as pairs it is exact and small.

    Args:
        rank: r of each task's A (r, d_in) and B (d_out, r).
        alpha: None = 2 * rank.
        dropout: of the corrections' input in training, 0 to below 1.
        weight: of the mean, 0 or more; the paper's lambda.
        share: of a layer's entries that a task marks, above 0 and at most 1; the paper's M.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        train_projector: let the projector between the towers learn as well.
        seed: of the first A of each task.

    **Remembers** one bit for each entry of an adapted weight, however many tasks come (0.8 GB for
    the 6.5e9 of a LLaVA-7B; a list of int32 places would be 0.5 GB for every task); the model gets
    r (d_in + d_out) float32 numbers a layer and task.

    **Asks of the model** ``linears(which)``, ``freeze(*towers)``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        weight: float = 2500.0,
        share: float = 0.02,
        layers: Which = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if weight < 0 or not 0 < share <= 1:
            raise ValueError(
                f"weight is {weight} and share {share}: give a weight of 0 or more and a share "
                "above 0 and at most 1"
            )
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.weight, self.share, self.seed = weight, share, seed
        self.layers: Which = layers
        self.train_projector = train_projector
        self.marks = Snapshot()

    def attach(self, model: VLM) -> None:
        """Freeze the model and put the first task's pair into its language model."""
        names = frozen_linears(model, self.layers, self.train_projector, by=self)
        scale = self.alpha / self.rank
        install(cast(nn.Module, model), names, lambda one: LowRankSlots(one, scale, self.dropout))
        grow_slots(model, 1, self.rank, self.seed)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Freeze the older pairs and add the task's own, which changes no answer yet."""
        for layer in grow_slots(model, task.index + 1, self.rank, self.seed).values():
            layer.activate("sum")

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return what the new pair changes at marked entries, as "held"; nothing in task one."""
        if self.marks.is_empty or not self.weight:
            return {}
        marks = self.marks.tensors
        sizes = []
        for name, layer in self._of(model).items():
            newest = layer.slot(len(layer.slots) - 1)
            sizes.append(mean_size_at(newest.A, newest.B, marks[name]))
        return {"held": self.weight * mean_of(sizes)}

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Mark where the task's pair is largest; needs no data."""
        known, marks = self.marks.tensors, {}
        for name, layer in self._of(model).items():
            newest = layer.slot(len(layer.slots) - 1)
            marks[name] = pack_bits(largest(newest.B @ newest.A, self.share))
            if name in known:
                marks[name] |= known[name]
        self.marks.take(marks)

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Merge all pairs into the weights for the length of a block."""
        return folded(cast(nn.Module, model))

    def holdings(self) -> Mapping[str, int]:
        """Return in how many layers something is marked."""
        return {"marks": sum(bool(bits.any()) for bits in self.marks.tensors.values())}

    def _of(self, model: VLM) -> dict[str, LowRankSlots]:
        return installed(cast(nn.Module, model), LowRankSlots)
