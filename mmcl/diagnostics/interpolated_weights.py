"""Weights of a model with its adapters merged, as one set that can be interpolated and written.

A LoRA adapter B A has many pairs of factors for one product, and the mean of two products is not
the product of the means. So weights of different checkpoints are compared and mixed here, never A
and B apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmcl.core.model import BASE_LAYER_NAMES, without_adapters
from mmcl.layers.adapters import adapter_layers, adapters_disabled
from mmcl.lightning.module import ContinualModule


@contextmanager
def merged_weights(module: ContinualModule) -> Iterator[dict[str, Tensor]]:
    """Merge adapters into the weights inside the block, and let the model run by these alone.

    Adapters that no weight can replace (gated or routed experts) take no part in the output
    meanwhile. After the block the module has its adapters and the bits of before, except where
    weights were written that belong to no adapter layer.

    Yields:
        name without adapters -> the model's own weights and buffers; write to them in place.
    """
    model = module.model
    with torch.no_grad(), module.strategy.merged_adapters(model), adapters_disabled(model):
        yield _own_tensors(model)


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights and buffers of a model that are not of an adapter."""
    adapted = tuple(f"{name}." for name in adapter_layers(model))
    found = {}
    named: list[tuple[str, Tensor]] = list(model.named_parameters(remove_duplicate=False))
    named += model.named_buffers(remove_duplicate=False)
    persistent = model.state_dict().keys()
    for name, tensor in named:
        prefix = next((each for each in adapted if name.startswith(each)), "")
        is_base = name.removeprefix(prefix).startswith(tuple(f"{b}." for b in BASE_LAYER_NAMES))
        if name in persistent and (not prefix or is_base):
            found[without_adapters(name)] = tensor.detach()
    return found


def copy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of weights on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}


def write_weights(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into a model's own tensors, as ``merged_weights`` gave them."""
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def different_weights(
    start: Mapping[str, Tensor], end: Mapping[str, Tensor], model: nn.Module
) -> list[str]:
    """Return the names of weights that differ between two checkpoints, which can be interpolated.

    Args:
        start: weights of one checkpoint.
        end: those of the other.
        model: has these parameters and buffers.

    Raises:
        ValueError: if names, shapes or buffers differ, or weights that are not floating point.
    """
    only = [f"'{name}' is in one of them only" for name in sorted(start.keys() ^ end.keys())]
    shapes = [
        f"'{name}' has shape {tuple(one.shape)} in one and {tuple(end[name].shape)} in the other"
        for name, one in start.items()
        if name in end and one.shape != end[name].shape
    ]
    if problems := only + shapes:
        raise ValueError(
            f"the checkpoints have different weights ({len(problems)}): {problems[0]}; give two "
            "of the same architecture, whose parameters do not grow"
        )
    found = [name for name, one in start.items() if not torch.equal(one, end[name])]
    every = model.named_parameters(remove_duplicate=False)
    parameters = {without_adapters(name) for name, _ in every}
    buffers = [name for name in found if name not in parameters]
    if buffers:
        raise ValueError(
            f"the buffer '{buffers[0]}' differs between the checkpoints ({len(buffers)} do), and "
            "between two networks running statistics of BatchNorm are those of neither: give "
            "checkpoints with frozen BatchNorm"
        )
    fixed = [name for name in found if not start[name].is_floating_point()]
    if fixed:
        raise ValueError(
            f"'{fixed[0]}' differs and is {start[fixed[0]].dtype}, as in a quantized model: only "
            "floating-point weights lie on a line"
        )
    return found
