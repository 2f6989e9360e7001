"""TinyLlava: a vision tower of open_clip or timm under a small Llama, as one LLaVA."""

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

from mmcl.models.chat_loading import TINY_LLAVA, Loaded
from mmcl.models.chat_saving import save_chat
from mmcl.models.image_text import ImageTextToText, Part
from mmcl.models.squares import Fit
from mmcl.models.vision_towers import Tower, vision_tower

CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


class TinyLlava(ImageTextToText):
    """A LLaVA made here: a given vision tower, a new projector and a new small language model.

    It is an ordinary ``LlavaForConditionalGeneration``; ``save`` writes a folder that transformers
    and ``ImageTextToText`` load. Its language model and projector begin with random weights, or
    with those of ``start``. Attention is computed plainly: at this size and on a CPU, the fused
    kernels of torch take half as long again in training.

    Args:
        tower: "tiny" (the built-in CLIP's), an open_clip architecture with a plain ViT such as
            "ViT-B-16", or "timm:<name>".
        tower_weights: "built-in" (tiny only), a tag or file of open_clip, "timm" for timm's own
            pretrained weights, or None for random ones.
        width: of the language model.
        layers: of the language model.
        heads: of the language model.
        mlp: width of the language model's inner layers.
        tokenizer: folder with a tokenizer.json; None = that of the built-in tiny LLaVA.
        feature_layer: hidden layer of the tower that the projector sees, -2 as in LLaVA.
        start: folder of an earlier stage, as ``save`` or ``mmcl export`` writes it, whose weights
            it begins with; None = the tower's and random ones.
        frozen: parts that do not learn.
        guide: as in ``ImageTextToText``.
        fit: as in ``ImageTextToText``.
        max_length: tokens of a row at most.
        seed: of random weights.
    """

    def __init__(
        self,
        tower: str = "tiny",
        tower_weights: str | None = "built-in",
        width: int = 192,
        layers: int = 3,
        heads: int = 3,
        mlp: int = 512,
        tokenizer: str | None = None,
        feature_layer: int = -2,
        start: str | None = None,
        frozen: Sequence[Part] = ("image",),
        guide: nn.Module | None = None,
        fit: Fit = "pad",
        max_length: int = 512,
        seed: int = 0,
    ) -> None:
        nn.Module.__init__(self)
        words = _tokenizer(Path(tokenizer) if tokenizer else TINY_LLAVA)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            seen = vision_tower(tower, tower_weights, seed)
            text = LlamaConfig(
                vocab_size=len(words), hidden_size=width, intermediate_size=mlp,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                max_position_embeddings=2048, tie_word_embeddings=True,
                bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )  # fmt: skip
            lm = _assembled(seen, text, words, feature_layer)
        if start is not None:
            _begin_with(lm, Path(start).expanduser())
        processor = _processor(seen, words)
        self._take(Loaded(lm, processor), guide, "model", fit, None, max_length)
        self.freeze(*frozen)

    def save(self, folder: Path) -> None:
        """Write config, weights and processor as transformers does."""
        save_chat(self.lm, self.processor, folder)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer {file}: give a folder with tokenizer.json")
    words: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    return words


def _assembled(seen: Tower, text: LlamaConfig, words: Any, feature_layer: int) -> nn.Module:
    config = LlavaConfig(
        vision_config=seen.config, text_config=text, projector_hidden_act="gelu",
        vision_feature_select_strategy="default", vision_feature_layer=feature_layer,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=seen.patches, tie_word_embeddings=True,
    )  # fmt: skip
    lm: nn.Module = LlavaForConditionalGeneration(config)
    inner: Any = lm
    inner.model.vision_tower.load_state_dict(seen.tower.state_dict())
    inner.generation_config.eos_token_id = words.eos_token_id
    inner.generation_config.pad_token_id = words.pad_token_id
    inner.set_attn_implementation("eager")
    return lm.float().eval().requires_grad_(True)


def _begin_with(lm: Any, folder: Path) -> None:
    """Load the weights of an earlier stage.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if its weights are of another model.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"start is {folder} and there is no config.json in it: give the folder of an earlier "
            "stage as model.save or 'mmcl export' writes it"
        )
    found = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    own, given = lm.state_dict(), found.state_dict()
    other = [name for name, tensor in own.items() if _shape(given, name) != tensor.shape]
    if other:
        raise ValueError(
            f"the weights in {folder} are of another model ({other[0]} is "
            f"{_shape(given, other[0])}, expected {tuple(own[other[0]].shape)}): give the tower, "
            "width, layers, heads, mlp and tokenizer of the earlier stage"
        )
    lm.load_state_dict(given)


def _shape(state: Mapping[str, torch.Tensor], name: str) -> torch.Size | None:
    return state[name].shape if name in state else None


def _processor(seen: Tower, words: Any) -> LlavaProcessor:
    side = {"height": seen.size, "width": seen.size}
    images = CLIPImageProcessor(
        size={"shortest_edge": seen.size}, crop_size=side, image_mean=seen.mean, image_std=seen.std
    )
    return LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=seen.patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT,
    )  # fmt: skip
