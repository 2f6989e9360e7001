"""Adapter layers that a strategy injects into a model in place of its linear layers."""

from mmcl.layers.inject import find_layers, inject, merged_adapters
from mmcl.layers.moe_lora_linear import MoELoRALinear
from mmcl.layers.multi_lora import LoRAAdapter, MultiLoRALinear

__all__ = [
    "MultiLoRALinear",
    "MoELoRALinear",
    "LoRAAdapter",
    "merged_adapters",
    "inject",
    "find_layers",
]
