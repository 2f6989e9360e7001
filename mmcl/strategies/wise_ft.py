"""WiSE-FT interpolates after each task between the weights before it and after it.

Paper: Wortsman et al. 2021, arXiv:2109.01903.
Code followed: none; written from the equation.
Differs: the line starts at the previous task's end (or, as in the paper, at the first weights),
because a stream has more than one end; running counts are not averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch

from mmcl.core import VLM, Batch, Strategy, Task, trainable_parameters
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.weight_interpolation import interpolate


class WiseFT(Strategy):
    """Weight interpolation after each task: (1 - alpha) * before + alpha * after.

    Args:
        alpha: 0 discards the task, 1 is plain fine-tuning.
        anchor: "previous" interpolates from the weights at the start of this task, "start" from
            those at the start of the first task.
        exclude: endings of parameter names that keep their new value. The logit scale is
            interpolated like any other weight unless "logit_scale" is named here.

    **Remembers** one copy of the trainable weights, at their own precision.

    **Asks of the model** nothing beyond the protocol.
    """

    reads_weights = rewrites_weights = True

    def __init__(
        self,
        alpha: float = 0.8,
        anchor: Literal["previous", "start"] = "previous",
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}, expected 0 (before) to 1 (after the task)")
        if anchor not in ("previous", "start"):
            raise ValueError(f"anchor is '{anchor}', expected 'previous' or 'start'")
        self.alpha, self.anchor, self.exclude = alpha, anchor, tuple(exclude)
        self.before = Snapshot()

    def begin_task(self, model: VLM, task: Task) -> None:
        """Copy the weights to interpolate from."""
        if self.anchor == "previous" or self.before.is_empty:
            self.before.take(trainable_parameters(model))

    @torch.no_grad()
    def end_task(self, model: VLM, task: Task, batches: Iterable[Batch]) -> None:
        """Write the interpolated weights into the model."""
        weights = {
            name: parameter
            for name, parameter in trainable_parameters(model).items()
            if not name.endswith(self.exclude)
        }
        for name, average in interpolate(self.before.tensors, weights, self.alpha).items():
            weights[name].copy_(average)

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of parameters copied."""
        return {"before": len(self.before)}
