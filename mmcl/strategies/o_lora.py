"""O-LoRA gives each task a low-rank correction that reads from other directions than all before.

Paper: Wang et al. 2023, arXiv:2310.14152.
Code followed: https://github.com/cmnfriend/O-LoRA for where the past takes part; written anew.
Differs: the overlap is a mean over layers and entries where paper and code sum, so its weight fits
models of any size; the past is frozen and detached, also in the variant of arXiv:2508.07307.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Output, Prompts, Strategy, Task
from mmcl.core.output import NO_PROMPTS
from mmcl.layers import LowRankSlots, Slot, folded, install, installed
from mmcl.layers.adapting import Which, check_sizes, frozen_linears, grow_slots
from mmcl.ops.orthogonality import Measure, mean_of, overlap


class OLoRA(Strategy):
    """One LoRA for each task, all of them in the forward pass, the new one pushed off the old ones.

    ``W x + alpha / rank * sum of B_i A_i x``; only the newest pair learns. From the second task on
    the loss has ``weight * mean |A_old A_new^T|``, over all layers and all entries of the (R, rank)
    overlap, R the ranks of all older tasks together. At test all pairs are added; no task is named.

    The code's lambda_1 weighs the sum: lambda_1 = weight / (layers * R * rank). With 224 layers of
    rank 16 the default is lambda_1 = 0.017 in the second task; 0.05, as in arXiv:2508.07307, would
    be weight = 2900, and the code's 0.5 on 48 layers of rank 8 weight = 1500. lambda_2, of the sum
    of norms over layers, is decay / layers.

    Args:
        rank: r of each task's A (r, d_in) and B (d_out, r).
        alpha: None = 2 * rank.
        dropout: of the corrections' input in training, 0 to below 1.
        weight: of the overlap, 0 or more.
        overlap: entries are taken "absolute", as the code does, or "squared", as the paper does.
        decay: weight of the new pair's norms, |A| + |B|, mean over layers; 0 or more.
        past_in_forward: False leaves older pairs out of training and adds them at test only.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        train_projector: let the projector between the towers learn as well.
        seed: of the first A of each task.

    **Remembers** nothing of its own; the model gets r (d_in + d_out) float32 numbers a layer and
    task.

    **Asks of the model** ``linears(which)``, ``freeze(*towers)``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        weight: float = 1000.0,
        overlap: Measure = "absolute",
        decay: float = 0.0,
        past_in_forward: bool = True,
        layers: Which = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(rank, dropout)
        if weight < 0 or decay < 0:
            raise ValueError(f"weight is {weight} and decay {decay}: give 0 or more of each")
        if overlap not in ("absolute", "squared"):
            raise ValueError(f"overlap is '{overlap}', expected 'absolute' or 'squared'")
        self.rank, self.alpha, self.dropout = rank, 2 * rank if alpha is None else alpha, dropout
        self.weight, self.measure, self.decay = weight, overlap, decay
        self.past_in_forward, self.seed = past_in_forward, seed
        self.layers: Which = layers
        self.train_projector = train_projector

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

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Choose the pairs that answer, where that differs between training and test."""
        if not self.past_in_forward:
            self._choose(model, is_training=cast(nn.Module, model).training)
        return NO_PROMPTS

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return "overlap" with the past, and "decay" of the new pair where that has a weight."""
        layers = list(self._of(model).values())
        terms = {}
        if self.weight and len(layers[0].slots) > 1:
            terms["overlap"] = self.weight * mean_of(
                overlap(_past(layer), _newest(layer).A, self.measure) for layer in layers
            )
        if self.decay:
            newest = [_newest(layer) for layer in layers]
            norms = mean_of(slot.A.norm() + slot.B.norm() for slot in newest)
            terms["decay"] = self.decay * norms
        return terms

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Merge all pairs into the weights for the length of a block."""
        self._choose(model, is_training=False)
        return folded(cast(nn.Module, model))

    def _of(self, model: VLM) -> dict[str, LowRankSlots]:
        return installed(cast(nn.Module, model), LowRankSlots)

    def _choose(self, model: VLM, *, is_training: bool) -> None:
        for layer in self._of(model).values():
            count = len(layer.slots)
            own = tuple(range(count - 1 if is_training and not self.past_in_forward else 0, count))
            if layer.active != own:
                layer.activate("sum", own)


def _newest(layer: LowRankSlots) -> Slot:
    return layer.slot(len(layer.slots) - 1)


def _past(layer: LowRankSlots) -> Tensor:
    return torch.cat([layer.slot(number).A for number in range(len(layer.slots) - 1)])
