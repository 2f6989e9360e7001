"""OSF fine-tunes weights in full, but only across the directions in which they are strong.

Paper: Nayak et al. 2025, arXiv:2504.07097.
Code followed: peft's ``OSF`` layer, which this wraps; and its guide for sequences of tasks.
Differs: the preserved part grows so that any number of tasks can come, where peft's guide adds as
many ranks each time or divides by a known number; the paper's choice layer by layer is left out.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, cast

from torch import nn

from mmcl.core import VLM, Strategy, Task
from mmcl.layers import install, installed
from mmcl.layers.adapting import Which, frozen_linears

if TYPE_CHECKING:
    from mmcl.layers.peft_osf import OSFLinear


class OSF(Strategy):
    """Orthogonal subspace fine-tuning: strong singular directions stay, the weak ones learn.

    When a task begins, every weight is decomposed as it is then, earlier tasks included. Its
    strongest directions are preserved; factors of the rest learn, with gradients made orthogonal to
    what is preserved. Of m = min(d_out, d_in) directions task t may move
    ``m (1 - preserve) (1 - growth)^t``, rounded up, at least 1, at most m - 1.

    The gradient is orthogonal, and so is a step of SGD. Adam divides each number by its own size,
    which turns its steps into the preserved directions as well, here as with peft alone: about a
    tenth of the change of a small model went there. EWC does not fit, because what it weighs has
    another size in every task.

    Args:
        preserve: share of the directions that the first task may not move, between 0 and 1.
        growth: share of the movable directions that each later task may move no more, 0 to below 1.
        layers: which linear layers: "all", or those of "attention" or "mlp".
        train_projector: let the projector between the towers learn as well.

    **Remembers** nothing of its own; but the model's weights change in full, so a checkpoint holds
    them all, in the model's precision, and float32 factors as they are and as they began: with
    half preserved about three numbers for every weight, in all. That does not grow with the tasks.
    A layer is decomposed once for each task, and when a run goes on, once for each task it began.

    **Asks of the model** ``linears(which)``, ``freeze(*towers)``; weights that are not quantised.
    """

    def __init__(
        self,
        preserve: float = 0.5,
        growth: float = 0.1,
        layers: Which = "all",
        train_projector: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < preserve < 1 or not 0 <= growth < 1:
            raise ValueError(
                f"preserve is {preserve} and growth {growth}: give a preserve between 0 and 1 and "
                "a growth of 0 to below 1"
            )
        self.preserve, self.growth = preserve, growth
        self.layers: Which = layers
        self.train_projector = train_projector

    def attach(self, model: VLM) -> None:
        """Freeze the model and decompose the linear layers of its language model.

        Raises:
            ValueError: if weights are quantised.
        """
        from mmcl.layers.peft_osf import OSFLinear

        names = frozen_linears(model, self.layers, self.train_projector, by=self)
        packed = [name for name, one in names.items() if not one.weight.is_floating_point()]
        if packed:
            raise ValueError(
                f"{len(packed)} layers ({packed[0]}, ...) have quantised weights and OSF changes "
                "weights in full: load the model in fp32 or bf16"
            )
        install(
            cast(nn.Module, model),
            names,
            lambda linear: OSFLinear(linear, self.preserved(min(linear.weight.shape), 0)),
        )

    def begin_task(self, model: VLM, task: Task) -> None:
        """Decompose the weights as they are now; the first task's were when they were attached."""
        if task.index:
            for layer in self._of(model).values():
                layer.renew(self.preserved(min(layer.weight.shape), task.index))

    def folded(self, model: VLM) -> AbstractContextManager[None]:
        """Merge what was learned into the weights for the length of a block."""
        from mmcl.layers.peft_osf import folded_osf

        return folded_osf(cast(nn.Module, model))

    def preserved(self, directions: int, task: int) -> int:
        """Return how many directions a task may not move.

        Args:
            directions: of the layer, min(d_out, d_in).
            task: number of the task, from 0.

        Returns:
            1 to ``directions`` - 1, never less for a later task.
        """
        movable = math.ceil(directions * (1 - self.preserve) * (1 - self.growth) ** task)
        return max(1, directions - max(1, movable))

    def _of(self, model: VLM) -> dict[str, OSFLinear]:
        from mmcl.layers.peft_osf import OSFLinear

        return installed(cast(nn.Module, model), OSFLinear)
