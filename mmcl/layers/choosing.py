"""Choosing the slots that answer, pass by pass."""

from __future__ import annotations

from collections.abc import Iterable

from mmcl.layers.low_rank import LowRankSlots, Mode


def choose_slots(layers: Iterable[LowRankSlots], mode: Mode, slots: Iterable[int]) -> None:
    """Activate slots where something else is active now.

    So a strategy can choose before every forward pass, also while layers are folded for what it
    chooses.

    Args:
        layers: to change.
        mode: of ``LowRankSlots.activate``.
        slots: their numbers, in the order of the gates.
    """
    chosen = tuple(slots)
    for layer in layers:
        if (layer.mode, layer.active) != (mode, chosen):
            layer.activate(mode, chosen)
