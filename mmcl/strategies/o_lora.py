"""O-LoRA trains one LoRA adapter per task, orthogonal to the adapters of all earlier tasks.

Paper: Wang et al. 2023, arXiv:2310.14152.
Code followed: https://github.com/cmnfriend/O-LoRA for where older adapters take part; our own code.
Differs: the overlap is a mean over layers and entries where paper and code sum, so its weight fits
models of any size; older adapters are frozen and detached, also in the variant of arXiv:2508.07307.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Batch, Output, Prompts, Strategy, Task
from mmcl.core.model import NO_PROMPTS
from mmcl.layers import LoRAAdapter, MultiLoRALinear
from mmcl.layers.adapters import TaskAdapters, set_active_adapters
from mmcl.layers.target_layers import TargetModules
from mmcl.ops.lora_penalties import Measure, mean_over_layers, orthogonality_loss


class OLoRA(Strategy):
    """Orthogonal LoRA: one adapter per task, all of them summed, the new one orthogonal to the old.

    ``W x + alpha / rank * sum of B_i A_i x``; only the newest adapter is trainable. From the second
    task on the loss has ``overlap_weight * mean |A_old A_new^T|``, over all layers and all entries
    of the (R, rank) overlap, R the ranks of all older tasks together. At test all adapters are
    summed, so no task id is needed.

    The code's lambda_1 weighs the sum: lambda_1 = overlap_weight / (layers * R * rank). With 224
    layers of rank 16 the default is lambda_1 = 0.017 in the second task; 0.05, as in
    arXiv:2508.07307, would be an overlap_weight of 2900, and the code's 0.5 on 48 layers of rank 8
    one of 1500. lambda_2, of the sum of norms over layers, is decay / layers.

    Args:
        rank: r of each task's A (r, d_in) and B (d_out, r).
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the adapters' input in training, 0 to below 1.
        overlap_weight: weight of the overlap term, 0 or more.
        overlap: entries are taken "absolute", as the code does, or "squared", as the paper does.
        decay: weight of the new adapter's norms, |A| + |B|, mean over layers; 0 or more.
        past_in_forward: False leaves older adapters out of training and adds them at test only.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.
        seed: seed of the initial A of each task.

    **Remembers** nothing of its own; the model gets r (d_in + d_out) float32 numbers per layer and
    task.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        overlap_weight: float = 1000.0,
        overlap: Measure = "absolute",
        decay: float = 0.0,
        past_in_forward: bool = True,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if overlap_weight < 0 or decay < 0:
            raise ValueError(
                f"overlap_weight is {overlap_weight} and decay {decay}: give 0 or more of each"
            )
        if overlap not in ("absolute", "squared"):
            raise ValueError(f"overlap is '{overlap}', expected 'absolute' or 'squared'")
        self.overlap_weight, self.overlap, self.decay = overlap_weight, overlap, decay
        self.past_in_forward = past_in_forward

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the first task's adapter into its language model."""
        self.adapters.attach(model, by=self)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Freeze the older adapters and add the task's own, whose output is zero."""
        self.adapters.begin_task(model, task.index)
        self._activate(model, is_training=False)

    def prompts(self, model: VLM, batch: Batch) -> Prompts:
        """Activate the adapters of training or test, where these differ."""
        if not self.past_in_forward:
            self._activate(model, is_training=cast(nn.Module, model).training)
        return NO_PROMPTS

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return "overlap" with older adapters, and "decay" of the new one if it has a weight."""
        layers = list(self.adapters.layers_of(model).values())
        terms = {}
        if self.overlap_weight and len(layers[0].adapters) > 1:
            terms["overlap"] = self.overlap_weight * mean_over_layers(
                orthogonality_loss(_past(layer), _newest(layer).lora_A, self.overlap)
                for layer in layers
            )
        if self.decay:
            newest = [_newest(layer) for layer in layers]
            norms = mean_over_layers(one.lora_A.norm() + one.lora_B.norm() for one in newest)
            terms["decay"] = self.decay * norms
        return terms

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge all adapters into the weights inside the block."""
        self._activate(model, is_training=False)
        return self.adapters.merged_adapters(model)

    def _activate(self, model: VLM, *, is_training: bool) -> None:
        layers = list(self.adapters.layers_of(model).values())
        count = len(layers[0].adapters)
        first = count - 1 if is_training and not self.past_in_forward else 0
        set_active_adapters(layers, "sum", range(first, count))


def _newest(layer: MultiLoRALinear) -> LoRAAdapter:
    return layer.adapter(len(layer.adapters) - 1)


def _past(layer: MultiLoRALinear) -> Tensor:
    return torch.cat([layer.adapter(number).lora_A for number in range(len(layer.adapters) - 1)])
