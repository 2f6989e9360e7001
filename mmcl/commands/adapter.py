"""The adapter of a learned model as peft writes it, also of layers that are not peft's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmcl.core import Strategy
from mmcl.layers import LowRankSlots, installed
from mmcl.strategies.lora import LoRA, peft_state

_ROOT = "lm."


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        config: what ``adapter_config.json`` says.
        state: weights, named from the model of transformers on.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


def find_adapter(model: Any, strategies: Sequence[Strategy]) -> Adapter | None:
    """Return the adapter of a model, None if it has none that peft could run.

    Args:
        model: with ``lm`` of transformers.
        strategies: attached to it; those of a chain one by one.
    """
    for strategy in strategies:
        if isinstance(strategy, LoRA):
            return Adapter(strategy.peft_config(model), peft_state(model))
    layers = installed(model, LowRankSlots)
    if not layers or any(layer.mode not in ("one", "sum", "fused") for layer in layers.values()):
        return None
    return _stacked(model, {name.removeprefix(_ROOT): layer for name, layer in layers.items()})


def write_files(adapter: Adapter, folder: Path, *, half: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors, weights in float16 if ``half``."""
    state = {
        f"base_model.model.{name}": (tensor.half() if half else tensor).contiguous()
        for name, tensor in adapter.state.items()
    }
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(adapter.config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _stacked(model: Any, layers: Mapping[str, LowRankSlots]) -> Adapter | None:
    """Return the active slots of every layer as one adapter of their summed rank."""
    state: dict[str, Tensor] = {}
    shapes = set()
    for name, layer in layers.items():
        A, B = _as_one(layer)
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        shapes.add((len(A), float(layer.scale)))
    if len(shapes) != 1:
        return None
    rank, scale = shapes.pop()
    others = _others(model.lm, layers)
    state |= {name: parameter.detach().cpu() for name, parameter in others.items()}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,  # peft's scale is alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(layers),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in others}) or None,
        "base_model_name_or_path": getattr(model.lm.config, "_name_or_path", None) or None,
        "inference_mode": True,
        "task_type": None,
    }
    return Adapter(config, state)


def _as_one(layer: LowRankSlots) -> tuple[Tensor, Tensor]:
    """Return A and B that do what the active slots do together."""
    slots = [layer.slot(number) for number in layer.active]
    if layer.mode == "fused":
        A = torch.stack([slot.A for slot in slots]).sum(0)
        B = torch.stack([slot.B for slot in slots]).sum(0)
    else:
        A, B = torch.cat([slot.A for slot in slots]), torch.cat([slot.B for slot in slots], 1)
    return A.detach().cpu(), B.detach().cpu()


def _others(root: nn.Module, layers: Mapping[str, LowRankSlots]) -> dict[str, nn.Parameter]:
    """Return what learned beside the slots, such as a projector."""
    adapted = tuple(f"{name}." for name in layers)
    return {
        name: parameter
        for name, parameter in root.named_parameters()
        if parameter.requires_grad and not name.startswith(adapted)
    }
