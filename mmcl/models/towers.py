"""The two towers of an open_clip model, with learned tokens where a strategy puts them.

open_clip's own modules are called, none is patched: the forward pass is walked block by block only
where prompts enter, otherwise open_clip's own is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.output import Place


def image_embedding(clip: Any, images: Tensor, prompts: Mapping[Place, Tensor]) -> Tensor:
    """Encode pictures, with prompt tokens behind the class token.

    A prompt at layer l > 0 replaces the prompt tokens that arrive there, as in VPT-deep (Jia et al.
    2022, arXiv:2203.12119); if none arrive, they are inserted.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        images: (B, 3, H, W) normalised.
        prompts: (tower, layer) -> (B, P, D); places of the text tower are left alone.

    Returns:
        (B, E) not normalised.
    """
    own = {layer: tokens for (tower, layer), tokens in prompts.items() if tower == "image"}
    if not own:
        return torch.as_tensor(clip.encode_image(images))
    visual = _walkable(clip.visual, "image", "_embeds", "_pool", "transformer")
    _check_layers("image", own, len(visual.transformer.resblocks))
    tokens, inside = visual._embeds(images), 0
    for layer, block in enumerate(visual.transformer.resblocks):
        if layer in own:
            added = own[layer].to(tokens.dtype)
            tokens = torch.cat([tokens[:, :1], added, tokens[:, 1 + inside :]], dim=1)
            inside = added.shape[1]
        tokens = block(tokens)
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + inside :]], dim=1)
    pooled = visual._pool(tokens)[0]
    return torch.as_tensor(pooled if visual.proj is None else pooled @ visual.proj)


def text_embedding(clip: Any, tokens: Tensor, prompts: Mapping[Place, Tensor]) -> Tensor:
    """Encode texts, cut to the longest of them, with prompt tokens behind the start token.

    Cutting is exact for a causal tower that pools at the end token: nothing behind it is seen.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        tokens: (B, L) int64, 0 behind the end token.
        prompts: (tower, layer) -> (B, P, D); places of the image tower are left alone.

    Returns:
        (B, E) not normalised.
    """
    own = {layer: tokens for (tower, layer), tokens in prompts.items() if tower == "text"}
    text = getattr(clip, "text", clip)
    if not _is_causal_with_end_pooling(text, clip):
        if own:
            raise TypeError(
                f"text prompts need a causal open_clip text tower that pools at the end token, and "
                f"{type(text).__name__} is another: use modality='image'"
            )
        return torch.as_tensor(clip.encode_text(_at_full_length(tokens, text)))
    _check_layers("text", own, len(text.transformer.resblocks))
    hidden = text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]]
    inside = 0
    ends = tokens.argmax(dim=-1)
    for layer, block in enumerate(text.transformer.resblocks):
        if layer in own:
            added = own[layer].to(hidden.dtype)
            hidden = torch.cat([hidden[:, :1], added, hidden[:, 1 + inside :]], dim=1)
            inside = added.shape[1]
        hidden = block(hidden, attn_mask=_causal(hidden.shape[1], text.attn_mask))
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    pooled = text.ln_final(hidden[rows, ends + inside])
    projection = text.text_projection
    if projection is None:
        return torch.as_tensor(pooled)
    return torch.as_tensor(
        projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
    )


def cut(tokens: Tensor) -> Tensor:
    """Cut (B, L) tokens to the longest text, whose end is the last non-zero token."""
    longest = int((tokens != 0).sum(1).max()) if tokens.numel() else 0
    return tokens[:, : max(longest, 1)]


def widths(clip: Any) -> dict[str, int]:
    """Return the token width of each tower that prompts can enter."""
    found: dict[str, int] = {}
    if hasattr(clip.visual, "_embeds") and hasattr(clip.visual, "transformer"):
        found["image"] = int(clip.visual.transformer.width)
    text = getattr(clip, "text", clip)
    if _is_causal_with_end_pooling(text, clip):
        found["text"] = int(text.transformer.width)
    return found


def _is_causal_with_end_pooling(text: Any, clip: Any) -> bool:
    pooling = getattr(text, "pool_type", None) or getattr(clip, "text_pool_type", None)
    plain = getattr(text, "cls_emb", None) is None and not getattr(text, "use_pad_mask", False)
    return pooling == "argmax" and plain and getattr(text, "attn_mask", None) is not None


def _causal(length: int, mask: Tensor) -> Tensor:
    if length <= mask.shape[0]:
        return mask[:length, :length]
    return torch.full((length, length), float("-inf"), device=mask.device).triu(1)


def _at_full_length(tokens: Tensor, text: Any) -> Tensor:
    context = int(getattr(text, "context_length", tokens.shape[1]))
    missing = context - tokens.shape[1]
    padding = int(getattr(text, "pad_id", 0))
    return torch.nn.functional.pad(tokens, (0, missing), value=padding) if missing > 0 else tokens


def _walkable(visual: Any, tower: str, *members: str) -> Any:
    missing = [name for name in members if not hasattr(visual, name)]
    if missing:
        raise TypeError(
            f"{tower} prompts need an open_clip VisionTransformer, and this model has a "
            f"{type(visual).__name__}: choose a ViT model or a strategy without prompts"
        )
    return visual


def _check_layers(tower: str, own: Mapping[int, Tensor], layers: int) -> None:
    wrong = [layer for layer in own if not 0 <= layer < layers]
    if wrong:
        raise ValueError(
            f"{tower} prompts enter layer {wrong}, but the tower has 0 to {layers - 1}"
        )
