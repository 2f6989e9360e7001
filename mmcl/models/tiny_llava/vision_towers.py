"""Vision towers of open_clip and timm, converted to vision models of transformers for a LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

from mmcl.models.open_clip.loading import (
    BUILT_IN,
    load_clip,
    one_line,
    quiet_hub_access,
)
from mmcl.models.open_clip.pretrained_facts import preprocess_of

_TOLERANCE = 1e-4


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
    images = preprocess_of(clip)
    if not isinstance(images.size, int):
        raise _unsupported(name, f"takes images of {images.size} pixels")
    visual = clip.visual
    if not hasattr(visual, "conv1") or not hasattr(visual, "class_embedding"):
        raise ValueError(
            f"the vision tower of '{name}' is a {type(visual).__name__}, expected a plain ViT: use "
            "a ViT architecture of open_clip, or 'timm:<name>'"
        )
    config = _clip_vision_config(visual, images.size)
    tower = CLIPVisionModel(config).eval()
    state = _open_clip_state(name, visual.state_dict())
    missing = sorted(tower.state_dict().keys() - state.keys())
    if missing:
        raise _unsupported(name, f"has no '{missing[0]}'")
    tower.load_state_dict(state)
    stats = torch.tensor(images.mean).tolist(), torch.tensor(images.std).tolist()
    return Tower(tower, config, images.size, config.patch_size, *stats)


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


_OPEN_CLIP = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "blocks": "encoder.layers",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj", "attn.qkv": "self_attn",
}  # fmt: skip


def _open_clip_state(tower: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's weights under transformers' names, without those after pooling."""
    plain = {}
    for name, value in state.items():
        _, is_layer, layer = name.partition("transformer.resblocks.")
        if is_layer:
            number, _, inner = layer.partition(".")
            if inner.rpartition(".")[0] not in {"attn", *_OPEN_CLIP_BLOCK}:
                raise _unsupported(tower, f"has '{inner}' in its layers")
            name = f"blocks.{number}.{inner.replace('attn.in_proj_', 'attn.qkv.')}"
        plain[name] = value
    return _renamed(plain, _OPEN_CLIP, _OPEN_CLIP_BLOCK)


def _renamed(
    state: Mapping[str, Tensor], names: Mapping[str, str], block: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return weights under transformers' names, q, k and v apart, without unknown ones.

    Args:
        state: weights, those of the layers as "blocks.<i>.<name in block>.<kind>".
        names: names outside of layers, and "blocks".
        block: names inside of a layer; of "attn.qkv" that of the attention.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("blocks."):
            _, number, inner = stem.split(".", 2)
            prefix = f"{names['blocks']}.{number}.{block[inner]}"
            if inner != "attn.qkv":
                found[f"{prefix}.{kind}"] = value
                continue
            for letter, chunk in zip("qkv", value.chunk(3), strict=True):
                found[f"{prefix}.{letter}_proj.{kind}"] = chunk
        elif name in names:
            found[names[name]] = value
        elif stem in names:
            found[f"{names[stem]}.{kind}"] = value
    return found


def timm_tower(name: str, weights: str | None, seed: int) -> tuple[nn.Module, Any, Any]:
    """Load a ViT of timm and convert it to a vision model of transformers.

    Args:
        name: of timm, without "timm:".
        weights: "timm" for timm's pretrained weights, a .safetensors file, or None for random
            weights from ``seed``.
        seed: of random weights.

    Returns:
        The tower, its configuration, and timm's image settings (``mean``, ``std``).

    Raises:
        ValueError: if timm has no such model, or it is not a plain ViT.
        RuntimeError: if weights cannot be loaded or downloaded.
    """
    if weights == BUILT_IN:
        raise ValueError(
            f"tower_weights is '{BUILT_IN}' and tower is 'timm:{name}': only 'tiny' ships with "
            "mmcl; give 'timm' for timm's own weights, or null for random ones"
        )
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:3]
        raise ValueError(f"timm has no model '{name}': it has {', '.join(near)} and more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = _load_vit(name, weights).eval()
    return *convert_vit(name, vit), vit.pretrained_cfg


def _load_vit(name: str, weights: str | None) -> Any:
    if weights not in (None, "timm"):
        file = Path(str(weights)).expanduser()
        if file.suffix != ".safetensors" or not file.is_file():
            raise FileNotFoundError(
                f"tower_weights is {weights}, expected 'timm', null or a .safetensors file that "
                "exists"
            )
        vit = timm.create_model(name)
        own = vit.state_dict()
        stored = {key: value for key, value in load_file(file).items() if key in own}
        vit.load_state_dict(stored, strict=False)
        missing = sorted(key for key in own.keys() - stored.keys() if not key.startswith("head."))
        if missing:
            raise RuntimeError(
                f"{file} lacks {len(missing)} weights of '{name}' ({missing[0]}): give its own file"
            )
        return vit
    try:
        with quiet_hub_access():
            return timm.create_model(name, pretrained=weights == "timm")
    except Exception as error:  # every hub client raises errors of its own
        raise RuntimeError(
            f"cannot get weights of 'timm:{name}' ({one_line(error)}): without a network give a "
            ".safetensors file as tower_weights"
        ) from error


def convert_vit(name: str, vit: Any) -> tuple[nn.Module, Any]:
    """Convert a ViT of timm to a vision model of transformers with the same weights.

    Args:
        name: of the ViT, for errors.
        vit: model of timm in eval mode.

    Raises:
        ValueError: if neither CLIP's nor ViT's vision model gives the same hidden states.
    """
    reason = _unsupported_reason(vit)
    if reason:
        raise ValueError(
            f"'timm:{name}' {reason}, which transformers' CLIP and ViT do not support: use a ViT "
            "with a class token such as 'timm:vit_base_patch16_224' or "
            "'timm:vit_base_patch16_clip_224'"
        )
    is_clip = isinstance(vit.norm_pre, nn.LayerNorm)
    block = vit.blocks[0]
    options = {
        "hidden_size": vit.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": int(vit.patch_embed.img_size[0]),
        "patch_size": int(vit.patch_embed.patch_size[0]),
        "hidden_act": "quick_gelu" if "Quick" in type(block.mlp.act).__name__ else "gelu",
        "layer_norm_eps": block.norm1.eps,
    }
    config: Any = CLIPVisionConfig(**options) if is_clip else ViTConfig(**options)
    tower: Any = CLIPVisionModel(config) if is_clip else ViTModel(config)
    state = _renamed(vit.state_dict(), *(_TIMM_CLIP if is_clip else _TIMM_VIT))
    own = tower.state_dict()
    # transformers' CLIP keeps the embeddings of class token and positions without a batch.
    state = {name: value.reshape(own[name].shape) for name, value in state.items()}
    tower.load_state_dict({**{k: v for k, v in own.items() if k.startswith("pooler.")}, **state})
    _expect_same_states(name, vit, tower.eval())
    return tower, config


def _unsupported_reason(vit: Any) -> str:
    """Return what a ViT has that neither vision model of transformers has, or ""."""
    if type(vit).__name__ != "VisionTransformer":
        return f"is a {type(vit).__name__}"
    if not vit.has_class_token or vit.num_prefix_tokens != 1 or vit.no_embed_class:
        return "has other tokens in front of the patches than one class token"
    size, patch = vit.patch_embed.img_size, vit.patch_embed.patch_size
    if size[0] != size[1] or patch[0] != patch[1]:
        return "takes images or patches that are not square"
    names, block = _TIMM_CLIP if isinstance(vit.norm_pre, nn.LayerNorm) else _TIMM_VIT
    known = {*names, *block, "head", "fc_norm"}
    for name in vit.state_dict():
        inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
        if inner not in known and inner.rpartition(".")[0] not in known:
            return f"has '{name}'"
    return ""


_TIMM_CLIP = (
    {
        "cls_token": "embeddings.class_embedding",
        "pos_embed": "embeddings.position_embedding.weight",
        "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
        "norm_pre": "pre_layrnorm", "norm": "post_layernorm", "blocks": "encoder.layers",
    },
    {
        "norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        "attn.proj": "self_attn.out_proj", "attn.qkv": "self_attn",
    },
)  # fmt: skip
_TIMM_VIT = (
    {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm", "blocks": "layers",
    },
    {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2", "attn.proj": "attention.o_proj", "attn.qkv": "attention",
    },
)  # fmt: skip


@torch.no_grad()
def _expect_same_states(name: str, vit: Any, tower: Any) -> None:
    """Compare the hidden states of all layers on one image.

    Raises:
        ValueError: if they differ.
    """
    side = int(vit.patch_embed.img_size[0])
    image = torch.linspace(-2, 2, 3 * side * side).view(1, 3, side, side)
    options = {"indices": len(vit.blocks), "output_fmt": "NLC", "return_prefix_tokens": True}
    pairs = vit.forward_intermediates(image, intermediates_only=True, **options)
    expected = [torch.cat([prefix, patches], 1) for patches, prefix in pairs]
    converted = tower(image, output_hidden_states=True).hidden_states[1:]
    for ours, theirs in zip(converted, expected, strict=True):
        if not torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE * float(theirs.std())):
            raise ValueError(
                f"'timm:{name}' has other hidden states after conversion to transformers, so it "
                "cannot be LLaVA's vision tower here: use a plain ViT such as "
                "'timm:vit_base_patch16_224'"
            )
