"""TinyLlava: a LLaVA built from a vision tower of open_clip or timm and a small Llama."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmcl.models.hf_vlm.architectures import ModuleGroup
from mmcl.models.hf_vlm.image_inputs import ImageAspectRatio
from mmcl.models.hf_vlm.loading import TINY_LLAVA, LoadedVLM, save_pretrained
from mmcl.models.hf_vlm.model import ImageTextToText
from mmcl.models.tiny_llava.vision_towers import Tower, vision_tower

CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


class TinyLlava(ImageTextToText):
    """Small LLaVA of a given vision tower, a new projector and a new language model.

    It is an ordinary ``LlavaForConditionalGeneration``; ``save`` writes a folder that transformers
    and ``ImageTextToText`` load. Language model and projector start from random weights, or from
    those of ``start``. Attention is "eager": at this size and on a CPU, training with torch's
    fused kernels takes 1.5 times as long.

    Args:
        tower: "tiny" (that of the built-in CLIP), an open_clip architecture with a plain ViT such
            as "ViT-B-16", or "timm:<name>".
        tower_weights: "built-in" (tiny only), a tag or file of open_clip, "timm" for timm's own
            pretrained weights, or None for random ones.
        hidden_size: dim of the language model.
        num_layers: number of layers of the language model.
        num_heads: number of attention heads of the language model.
        mlp_dim: inner dim of the language model's MLPs.
        tokenizer: folder with a tokenizer.json; None = that of the built-in tiny LLaVA.
        feature_layer: hidden layer of the tower that the projector takes, -2 as in LLaVA.
        start: folder of an earlier stage, as ``save`` or ``mmcl export`` writes it, whose weights
            are loaded; None = the tower's and random ones.
        freeze: module groups that are not trained.
        routing_encoder: as in ``ImageTextToText``.
        image_aspect_ratio: as in ``ImageTextToText``.
        max_length: largest number of tokens of a sample.
        seed: of random weights.
    """

    def __init__(
        self,
        tower: str = "tiny",
        tower_weights: str | None = "built-in",
        hidden_size: int = 192,
        num_layers: int = 3,
        num_heads: int = 3,
        mlp_dim: int = 512,
        tokenizer: str | None = None,
        feature_layer: int = -2,
        start: str | None = None,
        freeze: Sequence[ModuleGroup] = ("image",),
        routing_encoder: nn.Module | None = None,
        image_aspect_ratio: ImageAspectRatio = "pad",
        max_length: int = 512,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        hf_tokenizer = _load_tokenizer(Path(tokenizer) if tokenizer else TINY_LLAVA)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vision = vision_tower(tower, tower_weights, seed)
            text = LlamaConfig(
                vocab_size=len(hf_tokenizer), hidden_size=hidden_size, intermediate_size=mlp_dim,
                num_hidden_layers=num_layers, num_attention_heads=num_heads,
                num_key_value_heads=num_heads, max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=hf_tokenizer.bos_token_id, eos_token_id=hf_tokenizer.eos_token_id,
                pad_token_id=hf_tokenizer.pad_token_id,
            )  # fmt: skip
            lm = _build_llava(vision, text, hf_tokenizer, feature_layer)
        if start is not None:
            _load_stage(lm, Path(start).expanduser())
        processor = _build_processor(vision, hf_tokenizer)
        loaded = LoadedVLM(lm, processor)
        self._set_up(loaded, routing_encoder, "model", max_length, image_aspect_ratio)
        self.freeze(*freeze)

    def save(self, folder: Path) -> None:
        """Write configuration, weights and processor as transformers does."""
        save_pretrained(self.lm, self.processor, folder)


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer {file}: give a folder with tokenizer.json")
    hf_tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return hf_tokenizer


def _build_llava(
    vision: Tower, text: LlamaConfig, hf_tokenizer: Any, feature_layer: int
) -> nn.Module:
    config = LlavaConfig(
        vision_config=vision.config, text_config=text, projector_hidden_act="gelu",
        vision_feature_select_strategy="default", vision_feature_layer=feature_layer,
        image_token_index=hf_tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=vision.patches, tie_word_embeddings=True,
    )  # fmt: skip
    lm: nn.Module = LlavaForConditionalGeneration(config)
    inner: Any = lm
    inner.model.vision_tower.load_state_dict(vision.tower.state_dict())
    inner.generation_config.eos_token_id = hf_tokenizer.eos_token_id
    inner.generation_config.pad_token_id = hf_tokenizer.pad_token_id
    inner.set_attn_implementation("eager")
    return lm.float().eval().requires_grad_(True)


def _load_stage(lm: Any, folder: Path) -> None:
    """Load the weights of an earlier stage.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its weights have other names or shapes.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"start is {folder} and there is no config.json in it: give the folder of an earlier "
            "stage, as model.save or 'mmcl export' writes it"
        )
    earlier = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    own, stored = lm.state_dict(), earlier.state_dict()
    different = [name for name, tensor in own.items() if _shape(stored, name) != tensor.shape]
    if different:
        name = different[0]
        raise ValueError(
            f"the weights in {folder} are of another model ({name} is {_shape(stored, name)}, "
            f"expected {tuple(own[name].shape)}): give the tower, hidden_size, "
            "num_layers, num_heads, mlp_dim and tokenizer of the earlier stage"
        )
    lm.load_state_dict(stored)


def _shape(state: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _build_processor(vision: Tower, hf_tokenizer: Any) -> LlavaProcessor:
    side = {"height": vision.size, "width": vision.size}
    images = CLIPImageProcessor(
        size={"shortest_edge": vision.size},
        crop_size=side,
        image_mean=vision.mean,
        image_std=vision.std,
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=hf_tokenizer, patch_size=vision.patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
