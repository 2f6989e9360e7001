"""Gradient checkpointing of transformers' models, with the gates of installed experts kept."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor

from mmcl.core.gates import KeptGates


def compute_twice(lm: Any, gates: MutableMapping[str, Tensor]) -> None:
    """Let a model of transformers compute its layers twice, to save memory."""
    # transformers 5 gave this a new name and warns of the old one.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(lm, name) for name in names if hasattr(lm, name))
    enable({"use_reentrant": False, "context_fn": KeptGates(gates)})
