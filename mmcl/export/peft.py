"""Export of a model's adapter as a peft folder, also of layers that are not peft's."""

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
from mmcl.export.hf import (
    RUN_WITH_MMCL,
    beyond_weights,
    example_batch,
    folder_bytes,
    hf_model,
    new_folder,
    strategies_of,
)
from mmcl.layers import MultiLoRALinear, find_layers
from mmcl.lightning.module import ContinualModule
from mmcl.strategies.lora import LoRA, peft_state

_ROOT = "lm."


@dataclass(frozen=True)
class Adapter:
    """A peft adapter.

    Attributes:
        config: content of ``adapter_config.json``.
        state: weights, named from the transformers model on.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]


def write_adapter(module: ContinualModule, folder: Path, *, half: bool) -> str:
    """Write the adapter alone, as a folder that ``PeftModel.from_pretrained`` loads.

    Returns:
        A report: folder, format and bytes.

    Raises:
        TypeError: if the model is not one of transformers.
        ValueError: if the folder exists, or there is no adapter that peft could run.
    """
    hf_model(module)
    adapter = exportable_adapter(module)
    if adapter is None:
        reason = beyond_weights(module, example_batch(module)) or "has no adapter here"
        raise ValueError(
            f"{type(module.strategy).__name__} {reason}, so there is nothing that peft can run: "
            f"{'use --as transformers' if reason.startswith('has no') else RUN_WITH_MMCL}"
        )
    with new_folder(folder) as temporary:
        _write_files(adapter, temporary, half=half)
    return f"{folder}: a peft adapter, {folder_bytes(folder)} bytes"


def exportable_adapter(module: ContinualModule) -> Adapter | None:
    """Return the adapter of a module, None if it has none or peft could not run it."""
    has_lm = getattr(module.model, "lm", None) is not None
    if not has_lm or beyond_weights(module, example_batch(module)):
        return None
    # This also sets layers that differ between training and evaluation to evaluation.
    with module.strategy.merged_adapters(module.model):
        pass
    return _find_adapter(module.model, strategies_of(module.strategy))


def _find_adapter(model: Any, strategies: Sequence[Strategy]) -> Adapter | None:
    for strategy in strategies:
        if isinstance(strategy, LoRA):
            return Adapter(strategy.peft_config(model), peft_state(model))
    layers = find_layers(model, MultiLoRALinear)
    if not layers or any(layer.mode not in ("one", "sum", "fused") for layer in layers.values()):
        return None
    return _stacked(model, {name.removeprefix(_ROOT): layer for name, layer in layers.items()})


def _write_files(adapter: Adapter, folder: Path, *, half: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors, weights in float16 if ``half``."""
    state = {
        f"base_model.model.{name}": (tensor.half() if half else tensor).contiguous()
        for name, tensor in adapter.state.items()
    }
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(adapter.config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _stacked(model: Any, layers: Mapping[str, MultiLoRALinear]) -> Adapter | None:
    """Return the active adapters of every layer as one adapter of their summed rank.

    None if ranks or scales differ between layers, which one peft config cannot state.
    """
    state: dict[str, Tensor] = {}
    shapes = set()
    for name, layer in layers.items():
        A, B = _stacked_factors(layer)
        state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        shapes.add((len(A), float(layer.scale)))
    if len(shapes) != 1:
        return None
    rank, scale = shapes.pop()
    others = _trainable_outside(model.lm, layers)
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


def _stacked_factors(layer: MultiLoRALinear) -> tuple[Tensor, Tensor]:
    """Return A (R, in) and B (out, R) whose product is that of the active adapters together."""
    adapters = [layer.adapter(index) for index in layer.active]
    if layer.mode == "fused":
        A = torch.stack([adapter.lora_A for adapter in adapters]).sum(0)
        B = torch.stack([adapter.lora_B for adapter in adapters]).sum(0)
    else:
        A, B = (
            torch.cat([adapter.lora_A for adapter in adapters]),
            torch.cat([adapter.lora_B for adapter in adapters], 1),
        )
    return A.detach().cpu(), B.detach().cpu()


def _trainable_outside(
    root: nn.Module, layers: Mapping[str, MultiLoRALinear]
) -> dict[str, nn.Parameter]:
    """Return the trainable parameters outside the adapted layers, such as a projector's."""
    adapted = tuple(f"{name}." for name in layers)
    return {
        name: parameter
        for name, parameter in root.named_parameters()
        if parameter.requires_grad and not name.startswith(adapted)
    }
