"""Adapter layers that a strategy injects into a model in place of its linear layers."""

from mmcl.layers.adapters import find_layers, inject, merged_adapters
from mmcl.layers.lora_layers import LoRAAdapter, MoELoRALinear, MultiLoRALinear

__all__ = [
    "MultiLoRALinear",
    "MoELoRALinear",
    "LoRAAdapter",
    "merged_adapters",
    "inject",
    "find_layers",
]
