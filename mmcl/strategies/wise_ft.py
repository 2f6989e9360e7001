"""WiSE-FT interpolates after each task between the weights before it and after it.

Paper: Wortsman et al. 2021, arXiv:2109.01903.
Code followed: none; written from the equation.
Differs: the line starts at the previous task's end (or, as in the paper, at the first weights),
because a stream has more than one end; running counts are not averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

import torch
from torch import nn

from mmcl.core import VLM, Batch, Strategy, Task, trainable_parameters
from mmcl.layers.adapters import adapter_layers
from mmcl.layers.lora_layers import MultiLoRALinear
from mmcl.memory.snapshot import Snapshot
from mmcl.ops.weight_interpolation import interpolate

_LORA_B = re.compile(r"adapters\.\d+\.lora_B|B|lora_B\.[^.]+\.weight")
_LORA = re.compile(rf"{_LORA_B.pattern}|adapters\.\d+\.lora_A|A|router|lora_A\.[^.]+\.weight")
"""Trainable parameters of the layers of LoRA strategies, ours and peft's."""


class WiseFT(Strategy):
    """Weight interpolation after each task: (1 - alpha) * before + alpha * after.

    Of an adapted layer the weight ``W + scale * B A`` is interpolated, not A and B, which would be
    another model: where ``B A`` was zero before, B is scaled by ``alpha``, and A and a router keep
    their new values. So adapters per task (OLoRA, RegLoRA, HiDe, LoRARouter) need anchor
    "previous", and adapters that every task trains (LoRA, MoELoRA) need anchor "start"; others are
    refused when the first task begins.

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
        """Copy the weights to interpolate from.

        Raises:
            ValueError: if the average of adapters is no adapter of their rank.
        """
        for name, layer in adapter_layers(cast(nn.Module, model)).items():
            problem = self._problem(layer)
            if problem:
                raise ValueError(f"WiseFT cannot average the weights of layer '{name}': {problem}")
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
        for layer in adapter_layers(cast(nn.Module, model)):
            own = [name for name in weights if name.startswith(f"{layer}.")]
            for name in own:
                parameter = weights.pop(name)
                if _LORA_B.fullmatch(name.removeprefix(f"{layer}.")):
                    parameter.mul_(self.alpha)
        for name, average in interpolate(self.before.tensors, weights, self.alpha).items():
            weights[name].copy_(average)

    def _problem(self, layer: nn.Module) -> str:
        """Return why a layer's average cannot be written into its adapters, "" if it can."""
        names = [name for name, p in layer.named_parameters() if p.requires_grad]
        unknown = [name for name in names if not _LORA.fullmatch(name)]
        if unknown:
            return f"{unknown[0]} is no factor of a LoRA product; fine-tune the layer in full"
        if not isinstance(layer, MultiLoRALinear):
            if self.anchor == "start" or not names:
                return ""
            return (
                "its adapter is trained by every task, and the average of two products B A has "
                "twice their rank; use anchor='start', or one adapter per task as OLoRA has"
            )
        trainable = sum(layer.adapter(i).is_trainable for i in range(len(layer.adapters)))
        if trainable > 1:
            return (
                "its experts are trained by every task and merged by their own strategy; leave "
                "WiseFT out of the chain"
            )
        if self.anchor == "start":
            return "adapters of earlier tasks are frozen; use anchor='previous'"
        return ""

    def buffer_sizes(self) -> Mapping[str, int]:
        """Return the number of parameters copied."""
        return {"before": len(self.before)}
