"""Layers that a strategy puts in the place of a model's linear ones, in ``attach``."""

from mmcl.layers.experts import MoELoRALinear
from mmcl.layers.install import folded, install, installed
from mmcl.layers.low_rank import LowRankSlots, Slot

__all__ = [
    "LowRankSlots",
    "MoELoRALinear",
    "Slot",
    "folded",
    "install",
    "installed",
]
