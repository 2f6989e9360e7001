"""Image-text-to-text models by name or folder, through transformers' own doors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmcl.models.conversation import Conversation, pieces_of, vicuna
from mmcl.models.families import family_of
from mmcl.models.loading import asking_a_hub

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
Precision = Literal["fp32", "bf16", "8bit", "4bit"]
Style = Literal["model", "vicuna_v1"]


@dataclass(frozen=True)
class Loaded:
    """A model and what prepares its input."""

    lm: Any
    processor: Any


def load_chat(model: str, pretrained: bool, precision: Precision, seed: int) -> Loaded:
    """Load a model and its processor.

    Args:
        model: "tiny-llava" (ships with mmcl), a local folder as transformers writes them, or a
            name on the hub such as "llava-hf/llava-1.5-7b-hf".
        pretrained: False takes the configuration and random weights from ``seed``.
        precision: of the weights: "fp32", "bf16", or "8bit" and "4bit" through bitsandbytes.
        seed: of random weights.

    Raises:
        FileNotFoundError: if a local folder does not exist.
        RuntimeError: if weights cannot be had, or quantisation has no GPU.
    """
    place = _place(model)
    options = _precision(precision)
    try:
        with asking_a_hub():
            processor = AutoProcessor.from_pretrained(place)
            if pretrained:
                lm = AutoModelForImageTextToText.from_pretrained(place, **options)
            else:
                lm = _random(place, options, seed)
    except Exception as error:  # hubs fail in as many ways as there are clients of them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RuntimeError(
            f"cannot get {model} ({reason}): without a network give a local folder with "
            "config.json, weights and processor files as transformers writes them"
        ) from error
    return Loaded(lm, processor)


def _place(model: str) -> str:
    if model == "tiny-llava":
        return str(TINY_LLAVA)
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {model}: give a local folder as transformers writes them, "
            "'tiny-llava', or a name on the hub such as 'llava-hf/llava-1.5-7b-hf'"
        )
    return model


def _random(place: str, options: dict[str, Any], seed: int) -> nn.Module:
    if "quantization_config" in options:
        raise ValueError("random weights cannot be quantised: use base_precision fp32 or bf16")
    config = AutoConfig.from_pretrained(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: nn.Module = AutoModelForImageTextToText.from_config(config, **options)
    return lm


def _precision(precision: Precision) -> dict[str, Any]:
    if precision in ("fp32", "bf16"):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return {"dtype": dtype, "attn_implementation": "sdpa"}
    if precision not in ("8bit", "4bit"):
        raise ValueError(
            f"base_precision is {precision!r}, expected 'fp32', 'bf16', '8bit' or '4bit'"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"base_precision is '{precision}' and this machine has no GPU that torch can use: "
            "quantised weights are computed on a GPU; use 'bf16' or 'fp32' here"
        )
    return {"quantization_config": _quantised(precision), "device_map": {"": "cuda"}}


def _quantised(precision: Precision) -> Any:
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise RuntimeError(
            f"base_precision is '{precision}' and bitsandbytes is not installed: "
            "pip install bitsandbytes"
        )
    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def conversation_of(loaded: Loaded, size: int, style: Style, max_length: int) -> Conversation:
    """Return how a model's dialogues become tokens.

    Args:
        loaded: model and processor.
        size: side of its pictures.
        style: "model" takes the processor's chat template, "vicuna_v1" LLaVA-1.5's format.
        max_length: tokens of a row at most.

    Raises:
        ValueError: if the tokenizer is a slow one, or the template cannot be taken apart.
    """
    processor, tokenizer = loaded.processor, loaded.processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            "the tokenizer is a slow one, which does not tell where tokens lie in a text: give a "
            "folder with tokenizer.json"
        )
    picture = str(processor.image_token)
    end = str(tokenizer.eos_token)
    has_template = style == "model" and getattr(processor, "chat_template", None)
    pieces = pieces_of(processor, picture, end) if has_template else vicuna(picture, end)
    expanded = _expanded(loaded, picture, size)
    specials = tuple(tokenizer.all_special_tokens)
    return Conversation(tokenizer, pieces, picture, expanded, specials, max_length)


def _expanded(loaded: Loaded, picture: str, size: int) -> str:
    """Return the text that the processor puts in place of one picture of this size."""
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    options = dict(family_of(loaded.lm).pictures)
    made = loaded.processor(
        images=[blank], text=[picture], add_special_tokens=False, return_tensors="pt", **options
    )
    ids = made["input_ids"][0].tolist()
    tokenizer = loaded.processor.tokenizer
    text = str(tokenizer.decode(ids, skip_special_tokens=False))
    again = tokenizer(text, add_special_tokens=False)["input_ids"]
    if again != ids:
        raise ValueError(
            f"a picture becomes {len(ids)} tokens that do not come back from their own text "
            f"({len(again)}): this processor is not supported"
        )
    return text
