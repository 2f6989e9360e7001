"""OSF fine-tunes all weights, but orthogonally to their largest singular directions.

Paper: Nayak et al. 2025, arXiv:2504.07097.
Code followed: peft's ``OSF`` layer, which this wraps; and its guide for sequences of tasks.
Differs: the preserved subspace grows so that any number of tasks can come, where peft's guide adds
as many ranks each time or divides by a known number; the paper's choice per layer is left out.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import cast

from torch import nn

from mmcl.core import VLM, Strategy, Task
from mmcl.layers import find_layers, inject
from mmcl.layers.target_layers import TargetModules, freeze_and_target


class OSF(Strategy):
    """Orthogonal subspace fine-tuning: large singular directions are preserved, small ones trained.

    When a task begins, every weight is decomposed as it is then, earlier tasks included. Its
    largest singular directions are preserved; factors of the rest are trained, with gradients
    projected orthogonal to the preserved ones. Of m = min(d_out, d_in) directions task t may change
    ``m (1 - preserve) (1 - growth)^t``, rounded up, at least 1, at most m - 1.

    The gradient is orthogonal, and so is a step of SGD. Adam divides each number by its own size,
    which turns its steps into the preserved directions as well, here as with peft alone: about a
    tenth of the change of a small model went there. EWC and WiseFT are refused, because the factors
    have other shapes in every task.

    Args:
        preserve: fraction of directions that the first task may not change, between 0 and 1.
        growth: fraction of the free directions that each later task preserves in addition, 0 to
            below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.

    **Remembers** nothing of its own; but the model's weights change in full, so a checkpoint holds
    them all, in the model's precision, and float32 factors, current and initial: with half
    preserved about three numbers for every weight, in all. That does not grow with the tasks. A
    layer is decomposed once for each task, and on resume once for each task that had begun.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``; weights that are
    not quantized.
    """

    def __init__(
        self,
        preserve: float = 0.5,
        growth: float = 0.1,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < preserve < 1 or not 0 <= growth < 1:
            raise ValueError(
                f"preserve is {preserve} and growth {growth}: give a preserve between 0 and 1 and "
                "a growth of 0 to below 1"
            )
        self.preserve, self.growth = preserve, growth
        self.target_modules: TargetModules = target_modules
        self.train_projector = train_projector

    def attach(self, model: VLM) -> None:
        """Freeze the model and decompose its target layers; a ValueError if they are quantized."""
        from mmcl.layers.peft_osf import OSFLinear

        names = freeze_and_target(model, self.target_modules, self.train_projector, by=self)
        packed = [name for name, one in names.items() if not one.weight.is_floating_point()]
        if packed:
            raise ValueError(
                f"{len(packed)} layers ({packed[0]}, ...) have quantized weights and OSF changes "
                "weights in full: load the model in fp32 or bf16"
            )

        def make(linear: nn.Linear) -> OSFLinear:
            return OSFLinear(linear, self.preserved(min(linear.weight.shape), 0))

        inject(cast(nn.Module, model), names, make)

    def begin_task(self, model: VLM, task: Task) -> None:
        """Decompose the weights as they are now; for the first task ``attach`` did so."""
        from mmcl.layers.peft_osf import OSFLinear

        layers = find_layers(cast(nn.Module, model), OSFLinear) if task.index else {}
        for layer in layers.values():
            layer.renew(self.preserved(min(layer.weight.shape), task.index))

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the trained factors into the weights inside the block."""
        from mmcl.layers.peft_osf import merged_osf

        return merged_osf(cast(nn.Module, model))

    def preserved(self, directions: int, task: int) -> int:
        """Return how many of min(d_out, d_in) singular ``directions`` a task may not change.

        1 to ``directions`` - 1, never fewer for a later task.
        """
        movable = math.ceil(directions * (1 - self.preserve) * (1 - self.growth) ** task)
        return max(1, directions - max(1, movable))
