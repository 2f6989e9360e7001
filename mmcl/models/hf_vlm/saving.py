"""Saving of generative VLMs as folders that transformers loads, without adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcl.models.hf_vlm.loading import without_progress_bars


def plain_model(lm: Any, state: Mapping[str, Tensor]) -> Any:
    """Build a model like ``lm`` without adapters around given weights, which are not copied.

    Args:
        lm: model of transformers, with or without adapters.
        state: all weights, under their names without adapters.

    Raises:
        RuntimeError: if a weight is missing or unknown.
    """
    # On the meta device no random weights are made, which would be replaced at once.
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    plain.load_state_dict(dict(state), strict=True, assign=True)
    plain.tie_weights()
    buffers = dict(lm.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            plain.get_submodule(owner)._buffers[last] = buffers[name].clone()
    plain.generation_config = copy.deepcopy(lm.generation_config)
    return plain.eval()


def plain_weight_names(lm: Any) -> set[str]:
    """Return the names of all weights of a model without adapters."""
    with torch.device("meta"):
        return set(type(lm)(copy.deepcopy(lm.config)).state_dict())


def save_pretrained(lm: Any, processor: Any, folder: Path) -> None:
    """Write configuration, weights and processor."""
    with without_progress_bars():
        lm.save_pretrained(folder)
        processor.save_pretrained(folder)
