"""peft's LoRA layer with a faster plain case, and a merge that leaves no rounding behind.

Nothing imports this file before a strategy needs peft, because peft imports transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmcl.layers.frozen import is_plain
from mmcl.ops.low_rank import low_rank_linear


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's ``lora.Linear``; one plain active adapter goes through ``low_rank_linear``.

    Whatever is not plain (dropout in training, DoRA and other variants, several adapters, merged
    or disabled ones, a base that is hooked) is peft's own forward. Parameters and names are
    peft's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Answer with the active adapter.

        Args:
            x: (..., d_in).
            args: for peft, as ``kwargs``.
            kwargs: for peft.

        Returns:
            (..., d_out).
        """
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        base = self.base_layer
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank_linear(x, base.weight, base.bias, A, B, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """Name of the one active adapter if it is plain LoRA and nothing else is going on."""
        names = self.active_adapters
        if len(names) != 1 or self.merged or self.disable_adapters:
            return None
        name: str = names[0]
        if name not in self.lora_A or not is_plain(self.base_layer):
            return None
        variant = getattr(self, "lora_variant", {}).get(name) or self.use_dora.get(name)
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
        is_bare = is_plain(self.lora_A[name]) and is_plain(self.lora_B[name])
        if variant or drops or not is_bare or self.lora_B[name].bias is not None:
            return None
        return name


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge peft's active adapters inside the block; the weights after it are the bits before it.

    peft's own ``unmerge`` subtracts what was added, which rounds. Quantised layers and layers that
    were merged before stay as they are.

    Args:
        model: with peft's LoRA layers in it.
    """
    kept: list[tuple[LoraLayer, dict[str, Tensor], dict[str, Any]]] = []
    try:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and not layer.merged and _is_floating(layer):
                own = layer.get_base_layer()
                bits = {name: p.data for name, p in own.named_parameters(recurse=False)}
                kept.append((layer, bits, dict(getattr(layer, "_caches", {}))))
                _merge(layer, own, bits)
        yield
    finally:
        for layer, bits, caches in kept:
            own = layer.get_base_layer()
            for name, tensor in bits.items():
                parameter = getattr(own, name)
                parameter.data = tensor.to(parameter.device)
            layer.merged_adapters.clear()
            layer._caches = caches


def _is_floating(layer: LoraLayer) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def _merge(layer: LoraLayer, own: nn.Module, bits: dict[str, Tensor]) -> None:
    # Outside inference mode, because tensors made in it may not become weights.
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in bits.items():
            getattr(own, name).data = tensor.clone()
        layer.merge()
