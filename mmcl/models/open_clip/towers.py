"""Embeddings of the towers of an open_clip model, with prompts of a strategy; their similarity.

No module of open_clip is patched. Where prompts enter, its blocks are called one by one; otherwise
its own forward pass is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from torch import Tensor, nn
from torch.nn import functional

from mmcl.core.model import PromptPosition
from mmcl.core.padding import pad_id_of


def image_embedding(clip: Any, images: Tensor, prompts: Mapping[PromptPosition, Tensor]) -> Tensor:
    """Encode images, with prompt tokens after the class token.

    A prompt at layer l > 0 replaces the prompt tokens that arrive there, as in VPT-deep (Jia et al.
    2022, arXiv:2203.12119); if none arrive, they are inserted.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        images: (B, 3, H, W) normalized.
        prompts: (tower, layer) -> (B, P, D); those of the text tower are ignored.

    Returns:
        (B, E) not normalized.
    """
    own = {layer: tokens for (tower, layer), tokens in prompts.items() if tower == "image"}
    if not own:
        return torch.as_tensor(clip.encode_image(images))
    visual = clip.visual
    if not all(hasattr(visual, name) for name in ("_embeds", "_pool", "transformer")):
        raise TypeError(
            "image prompts need an open_clip VisionTransformer, and this model has a "
            f"{type(visual).__name__}: choose a ViT model or a strategy without prompts"
        )
    tokens, prompt_length = _run_blocks(visual, visual._embeds(images), own, "image")
    tokens = torch.cat([tokens[:, :1], tokens[:, 1 + prompt_length :]], dim=1)
    pooled = visual._pool(tokens)[0]
    return torch.as_tensor(pooled if visual.proj is None else pooled @ visual.proj)


def text_embedding(clip: Any, tokens: Tensor, prompts: Mapping[PromptPosition, Tensor]) -> Tensor:
    """Encode texts, with prompt tokens after the start token.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        tokens: (B, L) int64, padded by ``pad_texts`` to the tower's ``padded_length``.
        prompts: (tower, layer) -> (B, P, D); those of the image tower are ignored.

    Returns:
        (B, E) not normalized.
    """
    own = {layer: tokens for (tower, layer), tokens in prompts.items() if tower == "text"}
    text = getattr(clip, "text", clip)
    if not _is_causal_with_end_pooling(text, clip):
        if own:
            raise TypeError(
                f"text prompts need a causal open_clip text tower that pools at the end token, and "
                f"this is a {type(text).__name__}: use modality='image'"
            )
        return torch.as_tensor(clip.encode_text(tokens))
    embedded = text.token_embedding(tokens) + text.positional_embedding[: tokens.shape[1]]
    hidden, prompt_length = _run_blocks(text, embedded, own, "text", text.attn_mask)
    ends = tokens.argmax(dim=-1)
    samples = torch.arange(hidden.shape[0], device=hidden.device)
    pooled = text.ln_final(hidden[samples, ends + prompt_length])
    projection = text.text_projection
    if projection is None:
        return torch.as_tensor(pooled)
    is_linear = isinstance(projection, nn.Linear)
    return torch.as_tensor(projection(pooled) if is_linear else pooled @ projection)


def similarity(scale: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the scaled cosine similarity of unit embeddings, in float32 also under autocast.

    In bfloat16 scores between 16 and 32 are multiples of 1/8, so that classes would tie.

    Args:
        scale: () factor.
        left: (B, E) float32.
        right: (C, E) float32, or (B, C, E) for each of B.

    Returns:
        (B, C).
    """
    with torch.autocast(left.device.type, enabled=False):
        if right.ndim == 2:
            return scale * left @ right.T
        return scale * torch.einsum("be,bce->bc", left, right)


def _run_blocks(
    tower: Any, tokens: Tensor, own: Mapping[int, Tensor], name: str, mask: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return the tokens after all blocks, prompts behind the first one, and the prompts' length."""
    blocks, prompt_length = tower.transformer.resblocks, 0
    wrong = [layer for layer in own if not 0 <= layer < len(blocks)]
    if wrong:
        raise ValueError(
            f"{name} prompts enter layer {wrong}, but the tower has layers 0 to {len(blocks) - 1}: "
            "choose among these"
        )
    for layer, block in enumerate(blocks):
        if layer in own:
            added = own[layer].to(tokens.dtype)
            tokens = torch.cat([tokens[:, :1], added, tokens[:, 1 + prompt_length :]], dim=1)
            prompt_length = added.shape[1]
        masks = {} if mask is None else {"attn_mask": _causal_mask(tokens.shape[1], mask)}
        tokens = block(tokens, **masks)
    return tokens, prompt_length


def padded_length(clip: Any, tokenizer: Any) -> int | None:
    """Return the length that texts must be padded to, None if that of their longest is enough.

    A causal tower that pools at the end token sees nothing after it, and a tower of transformers
    masks its pad token. In every other tower tokens attend to the padding, or it is pooled.

    Args:
        clip: an open_clip CLIP or CustomTextCLIP.
        tokenizer: of the model, None if it has none.
    """
    text, pad_id = getattr(clip, "text", clip), pad_id_of(tokenizer)
    # A pad token of another id could be the largest of a text, which is taken for the end token.
    if _is_causal_with_end_pooling(text, clip) and pad_id == 0:
        return None
    config = getattr(text, "config", None)
    if isinstance(text, HFTextEncoder) and getattr(config, "pad_token_id", None) == pad_id:
        return None
    owners = (tokenizer, text, clip)
    lengths = [getattr(owner, "context_length", None) for owner in owners]
    return next((int(length) for length in lengths if length), None)


def pad_texts(tokens: Tensor, is_real: Tensor, pad_id: int, length: int | None) -> Tensor:
    """Pad texts as their tower takes them, with its own pad token.

    Args:
        tokens: (B, L) int64, padded with any token.
        is_real: (B, L) bool, False on padding.
        pad_id: pad token of the tower.
        length: number of tokens to return, None = that of the longest text, 1 at least.
    """
    if length is None:
        places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        length = max(1, int((places * is_real.any(0)).max())) if tokens.numel() else 1
    padded = tokens.masked_fill(~is_real, pad_id)[:, :length]
    return functional.pad(padded, (0, length - padded.shape[1]), value=pad_id)


def token_dims(clip: Any) -> dict[str, int]:
    """Return the token dim of each tower that prompts can enter."""
    dims: dict[str, int] = {}
    if hasattr(clip.visual, "_embeds") and hasattr(clip.visual, "transformer"):
        dims["image"] = int(clip.visual.transformer.width)
    text = getattr(clip, "text", clip)
    if _is_causal_with_end_pooling(text, clip):
        dims["text"] = int(text.transformer.width)
    return dims


def _is_causal_with_end_pooling(text: Any, clip: Any) -> bool:
    pooling = getattr(text, "pool_type", None) or getattr(clip, "text_pool_type", None)
    is_plain = getattr(text, "cls_emb", None) is None and not getattr(text, "use_pad_mask", False)
    return pooling == "argmax" and is_plain and getattr(text, "attn_mask", None) is not None


def _causal_mask(length: int, mask: Tensor) -> Tensor:
    if length <= mask.shape[0]:
        return mask[:length, :length]
    return torch.full((length, length), float("-inf"), device=mask.device).triu(1)
