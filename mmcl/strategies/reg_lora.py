"""RegLoRA trains one LoRA adapter per task, regularized where earlier adapters are largest.

Paper: Chen et al. 2025, arXiv:2505.02486. From SEFE; its Answer Style Diversification, which
rewrites the data, is left out.
Code followed: none; written from the equations.
Differs: older adapters stay next to the frozen weights instead of being merged into them, which is
the same function; entries that several tasks mark count once; dropout is of all adapters' input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mmcl.core import VLM, Batch, Output, Strategy, Task
from mmcl.layers.adapters import TaskAdapters
from mmcl.layers.target_layers import TargetModules
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.lora_penalties import masked_mean_abs, mean_over_layers, pack_bits, top_fraction_mask


class RegLoRA(Strategy):
    """Regularized LoRA: one adapter per task, all summed, the new one small where old are large.

    A layer is ``W x + alpha / rank * sum of B_i A_i x``; only the newest adapter is trainable. When
    a task ends, the ``top_fraction`` largest entries of its |B A| are marked in every layer. From
    the second task on the loss has ``reg_weight`` times the mean over layers of the mean of |B A|,
    of the new adapter and without alpha / rank, over the marked entries.

    Merging old adapters into W would put a full copy of the weights into every checkpoint and
    change the ``fingerprint`` that stored features are bound to; as adapters they are exact and
    small.

    Args:
        rank: r of each task's A (r, d_in) and B (d_out, r).
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the adapters' input in training, 0 to below 1.
        reg_weight: weight of the regularization term, 0 or more; the paper's lambda.
        top_fraction: fraction of a layer's entries that a task marks, above 0 to 1; the paper's M.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.
        seed: seed of the initial A of each task.

    **Remembers** one bit for each entry of an adapted weight, for any number of tasks (0.8 GB for
    the 6.5e9 of a LLaVA-7B; a list of int32 indices would be 0.5 GB for every task); the model gets
    r (d_in + d_out) float32 numbers per layer and task.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        reg_weight: float = 2500.0,
        top_fraction: float = 0.02,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        if reg_weight < 0 or not 0 < top_fraction <= 1:
            raise ValueError(
                f"reg_weight is {reg_weight} and top_fraction {top_fraction}: give a reg_weight "
                "of 0 or more and a top_fraction above 0 and at most 1"
            )
        self.reg_weight, self.top_fraction = reg_weight, top_fraction
        self.marks = Snapshot()

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the first task's adapter into its language model."""
        self.adapters.attach(model, by=self)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Freeze the older adapters and add the task's own, whose output is zero."""
        for layer in self.adapters.begin_task(model, task.index).values():
            layer.set_adapters("sum")

    def penalty(self, model: VLM, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Return the regularization term of the new adapter at marked entries, as "held"."""
        if self.marks.is_empty or not self.reg_weight:
            return {}
        marks = self.marks.tensors
        sizes = []
        for name, layer in self.adapters.layers_of(model).items():
            newest = layer.adapter(len(layer.adapters) - 1)
            sizes.append(masked_mean_abs(newest.lora_A, newest.lora_B, marks[name]))
        return {"held": self.reg_weight * mean_over_layers(sizes)}

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Mark the largest entries of the task's adapter; needs no data."""
        known, marks = self.marks.tensors, {}
        for name, layer in self.adapters.layers_of(model).items():
            newest = layer.adapter(len(layer.adapters) - 1)
            with torch.autocast(newest.lora_A.device.type, enabled=False):
                product = newest.lora_B @ newest.lora_A
            marks[name] = pack_bits(top_fraction_mask(product, self.top_fraction))
            if name in known:
                marks[name] |= known[name]
        self.marks.take(marks)

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge all adapters into the weights inside the block."""
        return self.adapters.merged_adapters(model)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of layers with marked entries."""
        return {"marks": sum(bool(bits.any()) for bits in self.marks.tensors.values())}
