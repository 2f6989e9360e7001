"""peft's orthogonal subspace fine-tuning (OSF) layer, with copies, checkpoints and new tasks.

A file of its own because peft imports transformers, so it is read when a strategy needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import OSFConfig
from peft.tuners.osf import Linear as PeftLinear
from torch import Tensor, nn

from mmcl.layers.lora_layers import adapter_dtype
from mmcl.layers.original_weights import OriginalWeights

_ADAPTER = "default"
_KEPT = ("_osf_U_low_init", "_osf_S_low_init", "_osf_V_low_init", "_osf_U_high", "_osf_V_high")


class OSFLinear(PeftLinear):  # type: ignore[misc]
    """``W x + (U S V - U_0 S_0 V_0) x``, with U_0 S_0 V_0 the small singular directions of W.

    Forward, decomposition and the hooks that project gradients are peft's. In addition:

    - W is a buffer, because from the second task on it is no longer the pretrained weight: it
      belongs in a checkpoint, which leaves out frozen parameters;
    - so are U_0, S_0 and V_0, which peft does not save and decomposes again, with other rounding;
    - a deep copy projects its gradients (with peft's own it silently does not: torch copies
      parameters without their hooks);
    - U, S and V are float32, or float64 for float64, also with narrower weights.

    Args:
        base: a linear layer with floating weights.
        preserved: singular directions that may not change, 1 to min(d_out, d_in) - 1.

    **Remembers** W (d_out, d_in), and U (d_out, k), S (k,), V (k, d_in) twice, now and as they
    started; and the preserved directions of the longer side. k is min(d_out, d_in) - ``preserved``.
    """

    def __init__(self, base: nn.Linear, preserved: int) -> None:
        weight = base.weight.detach()
        del base.weight
        base.register_buffer("weight", weight)
        super().__init__(base, _ADAPTER, OSFConfig(), effective_rank=preserved)
        for name in _KEPT:
            kept = getattr(self, name)
            kept.persistent = True
            for adapter, tensor in list(kept.items()):
                kept[adapter] = tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach the gradient hooks of a copy."""
        super().__setstate__({**state, "hook_handles": []})
        self._attach_hooks(_ADAPTER)

    @property
    def weight(self) -> Tensor:
        """Weight W at the start of the task, where other code expects one."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """Frozen bias, where other code expects one."""
        return cast("Tensor | None", self.base_layer.bias)

    def update_layer(self, adapter_name: str, effective_rank: int, **how: Any) -> None:
        """Decompose W as peft does, in a dtype wide enough for small updates."""
        self._detach_hooks()
        narrow = self.base_layer.weight.data
        self.base_layer.weight.data = narrow.to(adapter_dtype(narrow))
        try:
            super().update_layer(adapter_name, effective_rank, **how)
        finally:
            self.base_layer.weight.data = narrow

    @torch.no_grad()
    def renew(self, preserved: int) -> None:
        """Merge U, S, V into W, in W's precision, and decompose it again, as in the constructor."""
        self.merge()
        self.merged_adapters.clear()
        self.update_layer(_ADAPTER, preserved, config=OSFConfig())


@contextmanager
def merged_osf(model: nn.Module) -> Iterator[None]:
    """Merge U, S, V into W inside the block; after it W is the same bits as before.

    peft itself cannot unmerge these layers.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, OSFLinear)]
    originals = OriginalWeights()
    try:
        # Outside inference mode, because tensors made in it may not become weights.
        with torch.inference_mode(False), torch.no_grad():
            for layer in layers:
                originals.keep(layer.base_layer, "weight")
                layer.merge()
        yield
    finally:
        originals.restore()
        for layer in layers:
            layer.merged_adapters.clear()
