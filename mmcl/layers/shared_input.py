"""Shared input: LoRA layers that are called with the same tensor (q, k, v; gate, up) in one step.

The first layer of a group computes the outputs of all of them by ``low_rank_linears``; the others
return theirs when they are called with that tensor. A file of its own, because layers of mmcl and
of peft take part, and a group is no layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from mmcl.ops.lora_linear import LoRAWeights, low_rank_linears

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class SharesInput(Protocol):
    """LoRA layer that can take part in a group.

    Attributes:
        input_group: group of the layer, None = it has none.
    """

    input_group: SharedInput | None

    def plain_weights(self) -> LoRAWeights | None:
        """Return the weights of the next call if it is a plain LoRA linear map, else None."""
        ...


class SharedInput:
    """Group of LoRA layers with one input; it has no state between two forward passes.

    Args:
        layers: in the order in which the model calls them.
    """

    def __init__(self, layers: Iterable[SharesInput]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._mark: tuple[Any, ...] = ()
        self._outputs: dict[int, Tensor] = {}

    def output(self, layer: SharesInput, x: Tensor) -> Tensor | None:
        """Return the output (..., d_out) of a layer for x (..., d_in), None = compute it alone.

        A layer computes alone if x is another tensor than the first layer's, or was changed since.
        """
        mark = _mark(x)
        if layer is self.layers[0]:
            self._clear()
            maps = [one.plain_weights() for one in self.layers]
            if any(one is None for one in maps):
                return None
            first, *others = low_rank_linears(x, cast("list[LoRAWeights]", maps))
            self._input, self._mark = x, mark
            self._outputs = {id(one): out for one, out in zip(self.layers[1:], others, strict=True)}
            return first
        if x is not self._input or mark != self._mark:
            return None
        output = self._outputs.pop(id(layer), None)
        if not self._outputs:
            self._clear()
        return output

    def _clear(self) -> None:
        self._input, self._mark, self._outputs = None, (), {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the layers alone: outputs may be part of a graph, which cannot be copied."""
        return {"layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a group without outputs."""
        self.layers = state["layers"]
        self._clear()


def share_inputs(model: nn.Module, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> None:
    """Group the LoRA layers of some kinds that a model calls with one input.

    These are q_proj, k_proj and v_proj of self-attention, and gate_proj and up_proj of an MLP.
    """
    for parent in model.modules():
        if "cross" in type(parent).__name__.lower():  # q has another input than k and v
            continue
        for names in _GROUPS:
            layers = [getattr(parent, name, None) for name in names]
            if all(isinstance(layer, kinds) for layer in layers):
                group = SharedInput(cast("list[SharesInput]", layers))
                for layer in group.layers:
                    layer.input_group = group


def _mark(x: Tensor) -> tuple[Any, ...]:
    """Return what tells one call with a tensor from another."""
    version = -1 if x.is_inference() else x._version
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return version, torch.is_grad_enabled(), dtype
