"""peft's LoRA layer with a fused forward for the plain case, and a merge that is undone exactly.

A file of its own because peft imports transformers, so it is read when a strategy needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from mmcl.layers.lora_layers import is_plain_linear
from mmcl.layers.original_weights import OriginalWeights
from mmcl.layers.shared_input import SharedInput
from mmcl.ops.lora_linear import LoRAWeights, low_rank_linear


class FusedLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's ``lora.Linear`` with a fused forward (``low_rank_linear``) for one plain adapter.

    Everything else (dropout in training, DoRA and other variants, several adapters, merged or
    disabled ones, a base with hooks) goes through peft's own forward. Parameters and names are
    peft's. Layers with one input can share a product, see ``mmcl.layers.shared_input``.
    """

    input_group: SharedInput | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output (..., d_out) of base and adapter; the rest is for peft."""
        name = self._plain_adapter()
        if name is None or args or kwargs:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        if self.input_group is not None:
            shared = self.input_group.output(self, x)
            if shared is not None:
                return shared
        base = self.base_layer
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return low_rank_linear(x, base.weight, base.bias, A, B, self.scaling[name])

    def plain_weights(self) -> LoRAWeights | None:
        """Return the weights of the next call if they are those of plain LoRA, else None."""
        name, base = self._plain_adapter(), self.base_layer
        if name is None or any(p.requires_grad for p in base.parameters()):
            return None
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return LoRAWeights(base.weight, base.bias, A, B, self.scaling[name])

    def _plain_adapter(self) -> str | None:
        """Return the name of the active adapter if it is the only one and plain LoRA, else None."""
        names = self.active_adapters
        if len(names) != 1 or self.merged or self.disable_adapters:
            return None
        name: str = names[0]
        if name not in self.lora_A or not is_plain_linear(self.base_layer):
            return None
        variant = getattr(self, "lora_variant", {}).get(name) or self.use_dora.get(name)
        dropout = self.lora_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity) and dropout.p > 0
        is_bare = is_plain_linear(self.lora_A[name]) and is_plain_linear(self.lora_B[name])
        if variant or drops or not is_bare or self.lora_B[name].bias is not None:
            return None
        return name


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Merge peft's active adapters inside the block; after it the weights are the same bits.

    Rows of word embeddings that train are merged as well. peft's own ``unmerge`` subtracts the
    delta, which rounds. Quantized layers and layers that were merged before stay as they are.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer | TrainableTokensLayer)
        if not layer.merged and _is_floating(layer)
    ]
    caches: list[tuple[Any, dict[str, Any]]] = []
    originals = OriginalWeights()
    try:
        # All before the first is merged: tied embeddings and head are two layers around one weight.
        for layer in layers:
            for name, _ in layer.get_base_layer().named_parameters(recurse=False):
                originals.keep(layer.get_base_layer(), name)
        for layer in layers:
            caches.append((layer, dict(getattr(layer, "_caches", {}))))
            _merge(layer, originals)
        yield
    finally:
        originals.restore()
        for layer, own in caches:
            layer.merged_adapters.clear()
            if isinstance(layer, LoraLayer):
                layer._caches = own


def _is_floating(layer: Any) -> bool:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return isinstance(weight, Tensor) and weight.is_floating_point()


def _merge(layer: Any, originals: OriginalWeights) -> None:
    # Outside inference mode, because tensors made in it may not become weights.
    with torch.inference_mode(False), torch.no_grad():
        for parameter in layer.get_base_layer().parameters(recurse=False):
            parameter.data = originals.of(parameter).to(parameter.device, copy=True)
        layer.merge()
