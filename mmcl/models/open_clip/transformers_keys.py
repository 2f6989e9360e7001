"""Weights of transformers' CLIPModel and SiglipModel under open_clip's names.

A file of its own, since it is a table: transformers' names on the left, open_clip's on the right.
Query, key and value are three matrices there and one here; nothing else is computed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mmcl.models.open_clip.checkpoint_files import NamedTensor

_ANCHOR = re.compile(r"^(.*?)vision_model\.embeddings\.patch_embedding\.weight$")
_TEXT = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(.*)", r"ln_final.\1"),
    (r"text_model\.encoder\.layers\.(\d+)\.(.*)", r"transformer.resblocks.\1.\2"),
)
_CLIP = (
    *_TEXT,
    (r"text_projection\.weight", "text_projection"),
    (r"visual_projection\.weight", "visual.proj"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.(.*)", r"visual.ln_pre.\1"),
    (r"vision_model\.post_layernorm\.(.*)", r"visual.ln_post.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.(.*)", r"visual.transformer.resblocks.\1.\2"),
)
_SIGLIP = (
    *((pattern, f"text.{name}") for pattern, name in _TEXT),
    (r"text_model\.head\.(.*)", r"text.text_projection.\1"),
    (r"vision_model\.embeddings\.patch_embedding\.(.*)", r"visual.trunk.patch_embed.proj.\1"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.trunk.pos_embed"),
    (r"vision_model\.post_layernorm\.(.*)", r"visual.trunk.norm.\1"),
    (r"vision_model\.encoder\.layers\.(\d+)\.(.*)", r"visual.trunk.blocks.\1.\2"),
    (r"vision_model\.head\.probe", "visual.trunk.attn_pool.latent"),
    (r"vision_model\.head\.attention\.out_proj\.(.*)", r"visual.trunk.attn_pool.proj.\1"),
    (r"vision_model\.head\.attention\.in_proj_(.*)", r"visual.trunk.attn_pool.in_proj.\1"),
    (r"vision_model\.head\.layernorm\.(.*)", r"visual.trunk.attn_pool.norm.\1"),
    (r"vision_model\.head\.mlp\.(.*)", r"visual.trunk.attn_pool.mlp.\1"),
)
_OPEN_CLIP_BLOCK = (
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("self_attn.out_proj.", "attn.out_proj."),
    ("self_attn.qkv.", "attn.in_proj_"), ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
)  # fmt: skip
_TIMM_BLOCK = (
    ("layer_norm1.", "norm1."), ("layer_norm2.", "norm2."), ("self_attn.out_proj.", "attn.proj."),
    ("self_attn.qkv.", "attn.qkv."),
)  # fmt: skip


def is_transformers_form(tensors: Iterable[NamedTensor]) -> bool:
    """Return whether the keys are those of a CLIPModel or SiglipModel, under any prefix."""
    names = {tensor.name for tensor in tensors}
    roots = [found[1] for name in names if (found := _ANCHOR.match(name))]
    return any(
        f"{root}text_model.embeddings.token_embedding.weight" in names for root in roots
    ) and any(f"{root}logit_scale" in names for root in roots)


def rename_transformers_keys(tensors: Sequence[NamedTensor]) -> list[NamedTensor]:
    """Return the tensors of a CLIPModel or SiglipModel under open_clip's names.

    SigLIP's image tower becomes timm's. A tensor of the model that is in no table keeps its name.

    Args:
        tensors: of a checkpoint with ``is_transformers_form``; the others keep their names.
    """
    anchor, root = next((t, found[1]) for t in tensors if (found := _ANCHOR.match(t.name)))
    own = {t.name.removeprefix(root): t.tensor for t in tensors if t.name.startswith(root)}
    is_siglip = "vision_model.embeddings.class_embedding" not in own
    fused = _fuse(own)
    renamed = {_rename(name, is_siglip): value for name, value in fused.items()}
    if is_siglip:
        _split_pooling(renamed)
    for name in ("text_projection", "visual.proj"):
        if name in renamed:
            renamed[name] = renamed[name].T
    others = [tensor for tensor in tensors if not tensor.name.startswith(root)]
    return [NamedTensor(anchor.container, *item) for item in renamed.items()] + others


def _fuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with query, key and value of a layer in one matrix and one bias."""
    fused: dict[str, Tensor] = {}
    for name, value in state.items():
        found = re.fullmatch(r"(.*\.self_attn\.)([qkv])_proj\.(weight|bias)", name)
        parts = [f"{found[1]}{each}_proj.{found[3]}" for each in "qkv"] if found else []
        if found is None or not all(part in state for part in parts):
            fused[name] = value
        elif found[2] == "q":
            fused[f"{found[1]}qkv.{found[3]}"] = torch.cat([state[part] for part in parts])
    return fused


def _rename(name: str, is_siglip: bool) -> str:
    for pattern, replacement in _SIGLIP if is_siglip else _CLIP:
        if (found := re.fullmatch(pattern, name)) is None:
            continue
        renamed = found.expand(replacement)
        block = _TIMM_BLOCK if ".trunk." in renamed else _OPEN_CLIP_BLOCK
        for theirs, ours in block:
            renamed = renamed.replace(f".{theirs}", f".{ours}")
        return renamed
    return name


def _split_pooling(state: dict[str, Tensor]) -> None:
    """Give the pooling layer of timm its query, and its key and value, and the grid a batch dim."""
    pooling = "visual.trunk.attn_pool."
    for last in ("weight", "bias"):
        if (joined := state.pop(f"{pooling}in_proj.{last}", None)) is not None:
            dim = len(joined) // 3
            state[f"{pooling}q.{last}"], state[f"{pooling}kv.{last}"] = joined[:dim], joined[dim:]
    grid = state.get("visual.trunk.pos_embed")
    if grid is not None and grid.ndim == 2:
        state["visual.trunk.pos_embed"] = grid[None]
