"""Image-text-to-text models written as folders that transformers loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging


def with_weights(lm: Any, state: Mapping[str, Tensor]) -> Any:
    """Build a model like ``lm`` around given weights, without another copy of them.

    Args:
        lm: of transformers, perhaps with layers installed in it.
        state: all weights under the names that a model without such layers has.

    Raises:
        RuntimeError: if a weight is missing or too many.
    """
    # Nothing is drawn or held for weights that are replaced.
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    plain.load_state_dict(dict(state), strict=True, assign=True)
    plain.tie_weights()
    buffers = dict(lm.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:
            place, _, last = name.rpartition(".")
            plain.get_submodule(place)._buffers[last] = buffers[name].clone()
    plain.generation_config = copy.deepcopy(lm.generation_config)
    return plain.eval()


def names_without_layers(lm: Any) -> set[str]:
    """Return the names of all weights of a model in which nothing is installed."""
    with torch.device("meta"):
        return set(type(lm)(copy.deepcopy(lm.config)).state_dict())


def save_chat(lm: Any, processor: Any, folder: Path) -> None:
    """Write config, weights and processor, without drawing progress bars."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        lm.save_pretrained(folder)
        processor.save_pretrained(folder)
    finally:
        if was_on:
            logging.enable_progress_bar()
