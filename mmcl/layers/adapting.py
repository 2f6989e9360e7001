"""What strategies that correct a frozen language model have in common: where, and slot by slot."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from mmcl.core import VLM, require, trainable
from mmcl.core.randomness import generator
from mmcl.layers.install import installed
from mmcl.layers.low_rank import LowRankSlots

Which = Literal["all", "attention", "mlp"]


def check_sizes(rank: int, dropout: float) -> None:
    """Check what every low-rank correction is given.

    Raises:
        ValueError: if the rank is below 1, or dropout is no share below 1.
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise ValueError(
            f"rank is {rank} and dropout {dropout}: give a rank of 1 or more and a dropout from 0 "
            "to below 1"
        )


def frozen_linears(
    model: VLM, layers: Which, train_projector: bool, by: object
) -> dict[str, nn.Linear]:
    """Freeze a model and return the linear layers of its language model that are to be adapted.

    Args:
        model: with ``linears`` and ``freeze``.
        layers: "all", or those of "attention" or "mlp".
        train_projector: leave the projector between the towers as it is.
        by: the strategy that asks.

    Returns:
        full name -> layer, in the model's order.

    Raises:
        TypeError: if the model lacks a member.
        ValueError: if there is no such layer.
    """
    able = require(model, "linears", "freeze", by=by)
    _freeze(able, train_projector)
    found: dict[str, nn.Linear] = able.linears(layers)
    if not found:
        raise ValueError(
            f"model.linears('{layers}') is empty: choose other layers, or check the model"
        )
    return found


def _freeze(model: Any, but_the_projector: bool) -> None:
    """Freeze all that there is; some models have weights that belong to no tower."""
    model.freeze("image", "text")
    before = trainable(model)
    model.freeze("projector")
    projector = [p for p in before.values() if not p.requires_grad]
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(False)
    for parameter in projector:
        parameter.requires_grad_(but_the_projector)


def grow_slots(model: VLM, count: int, rank: int, seed: int) -> dict[str, LowRankSlots]:
    """Give every installed layer so many slots, and let only the last of them learn.

    Args:
        model: with ``LowRankSlots`` installed.
        count: of slots, 1 or more; layers that have them already get no more.
        rank: of a new slot.
        seed: of the first A; a slot's start depends on seed, slot and layer alone.

    Returns:
        full name -> layer, in the model's order.
    """
    layers = installed(cast(nn.Module, model), LowRankSlots)
    for place, layer in enumerate(layers.values()):
        while len(layer.slots) < count:
            layer.add_slot(rank, generator(seed, len(layer.slots), place))
        layer.freeze_slots(count - 1)
        for number in range(count - 1):
            layer.slot(number).zero_grad()  # the last task's gradients are not needed any more
    return layers
