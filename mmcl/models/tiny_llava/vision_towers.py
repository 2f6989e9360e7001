"""Vision towers of open_clip and timm, converted to transformers for a LLaVA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmcl.models.open_clip.loading import image_settings, load_clip
from mmcl.models.tiny_llava.timm_towers import timm_tower


@dataclass(frozen=True)
class Tower:
    """Vision tower with its image settings.

    Attributes:
        tower: vision model of transformers.
        config: of the tower.
        size: side of an image in pixels.
        patch: side of a patch in pixels.
        mean: (3,) of normalization, 0 to 1.
        std: (3,) of normalization, 0 to 1.
    """

    tower: nn.Module
    config: Any
    size: int
    patch: int
    mean: list[float]
    std: list[float]

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return (self.size // self.patch) ** 2


def vision_tower(name: str, weights: str | None, seed: int) -> Tower:
    """Load a vision tower by name.

    Args:
        name: "tiny", an open_clip architecture with a plain ViT, or "timm:<name>".
        weights: see ``TinyLlava``.
        seed: of random weights.

    Raises:
        ValueError: if the architecture is not a plain ViT.
        RuntimeError: if weights cannot be loaded or downloaded.
    """
    if name.startswith("timm:"):
        tower, config, settings = timm_tower(name.removeprefix("timm:"), weights, seed)
        stats = list(settings["mean"]), list(settings["std"])
        return Tower(tower, config, config.image_size, config.patch_size, *stats)
    clip: Any
    clip, _ = load_clip(name, weights, seed)
    size, mean, std = image_settings(clip)
    visual = clip.visual
    if not hasattr(visual, "conv1") or not hasattr(visual, "class_embedding"):
        raise ValueError(
            f"the vision tower of '{name}' is a {type(visual).__name__}, expected a plain ViT: use "
            "a ViT architecture of open_clip, or 'timm:<name>'"
        )
    config = _clip_vision_config(visual, size)
    tower = CLIPVisionModel(config).eval()
    state = _converted(name, visual.state_dict())
    missing = sorted(tower.state_dict().keys() - state.keys())
    if missing:
        raise _unsupported(name, f"has no '{missing[0]}'")
    tower.load_state_dict(state)
    return Tower(tower, config, size, config.patch_size, mean.tolist(), std.tolist())


def _unsupported(name: str, reason: str) -> ValueError:
    return ValueError(
        f"the vision tower of '{name}' {reason}, unlike CLIP's: use a plain ViT of open_clip such "
        "as 'ViT-B-16', or 'timm:<name>'"
    )


def _clip_vision_config(visual: Any, size: int) -> CLIPVisionConfig:
    block = visual.transformer.resblocks[0]
    is_quick = "Quick" in type(block.mlp.gelu).__name__
    return CLIPVisionConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(visual.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=size,
        patch_size=int(visual.conv1.kernel_size[0]),
        hidden_act="quick_gelu" if is_quick else "gelu",
        projection_dim=visual.conv1.out_channels,
    )


_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_BLOCK_NAMES = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def _converted(tower: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's weights under transformers' names, without those after pooling."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("transformer.resblocks."):
            block, _, inner = name.removeprefix("transformer.resblocks.").partition(".")
            if inner.rpartition(".")[0] not in {"attn", *_BLOCK_NAMES}:
                raise _unsupported(tower, f"has '{inner}' in its layers")
            found.update(_converted_block(f"encoder.layers.{block}", inner, value))
            continue
        stem, _, kind = name.rpartition(".")
        new = _NAMES.get(name) or (f"{_NAMES[stem]}.{kind}" if stem in _NAMES else None)
        if new is not None:
            found[new] = value
    return found


def _converted_block(prefix: str, name: str, value: Tensor) -> dict[str, Tensor]:
    stem, _, kind = name.rpartition(".")
    if stem == "attn" and kind.startswith("in_proj_"):
        kind = kind.removeprefix("in_proj_")
        chunks = zip("qkv", torch.chunk(value, 3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": chunk for letter, chunk in chunks}
    return {f"{prefix}.{_BLOCK_NAMES[stem]}.{kind}": value}
