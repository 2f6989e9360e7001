"""Image-text-to-text models by name or folder, through transformers' own doors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from mmcl.core import Dialogue, Turn
from mmcl.models.conversation import Conversation, pieces_of, vicuna
from mmcl.models.families import FAMILIES, family_of
from mmcl.models.loading import asking_a_hub
from mmcl.models.precision import Precision, weight_options

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
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
        FileNotFoundError: if a local folder or its config.json does not exist.
        ValueError: if precision is unknown, or the model is of another kind.
        RuntimeError: if weights cannot be had, or quantisation has no GPU.
    """
    place = _place(model)
    options = weight_options(precision, pretrained)
    try:
        with asking_a_hub(), _no_bars():
            processor = AutoProcessor.from_pretrained(place)
            if pretrained:
                lm = AutoModelForImageTextToText.from_pretrained(place, **options)
            else:
                lm = _random(place, options, seed)
    except Exception as error:  # hubs fail in as many ways as there are clients of them
        raise RuntimeError(_unavailable(model, place, error)) from error
    missing = [n for n in ("tokenizer", "image_processor") if not hasattr(processor, n)]
    if missing:
        raise ValueError(
            f"the processor of {model} is a {type(processor).__name__} without {missing[0]}: give "
            "a model of transformers that takes pictures and answers in text"
        )
    return Loaded(lm, processor)


def _place(model: str) -> str:
    if model == "tiny-llava":
        return str(TINY_LLAVA)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {model} has no config.json: give one that save_pretrained of a model "
                "and of its processor has written"
            )
        return str(path)
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {model}: give a local folder as transformers writes them, "
            "'tiny-llava', or a name on the hub such as 'llava-hf/llava-1.5-7b-hf'"
        )
    return model


def _unavailable(model: str, place: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if "Unrecognized configuration class" in reason:
        kind = re.search(r"\.(\w+)Config'", reason)
        return (
            f"{model} is {f'a {kind[1]}' if kind else 'another model'}, which takes no pictures "
            f"or gives no text: use one of type {', '.join(FAMILIES)}"
        )
    if isinstance(error, ImportError):
        return f"cannot load {model} ({reason}): install what is missing"
    if Path(place).is_dir():
        return (
            f"cannot load {model} ({reason}): the folder must hold config.json, weights, "
            "tokenizer.json and processor files as save_pretrained writes them"
        )
    return (
        f"cannot get {model} ({reason}): check the name on the hub; without a network give a local "
        "folder with config.json, weights and processor files as transformers writes them"
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _random(place: str, options: dict[str, Any], seed: int) -> nn.Module:
    config = AutoConfig.from_pretrained(place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: nn.Module = AutoModelForImageTextToText.from_config(config, **options)
    return lm.eval()


def conversation_of(loaded: Loaded, size: int, style: Style, max_length: int) -> Conversation:
    """Return how a model's dialogues become tokens.

    Args:
        loaded: model and processor.
        size: side of its pictures.
        style: "model" takes the processor's chat template, "vicuna_v1" LLaVA-1.5's format.
        max_length: tokens of a row at most.

    Raises:
        ValueError: if the tokenizer is a slow one, the template cannot be taken apart, or a picture
            takes more than ``max_length``.
    """
    processor, tokenizer = loaded.processor, loaded.processor.tokenizer
    if style not in ("model", "vicuna_v1"):
        raise ValueError(f"style is {style!r}, expected 'model' or 'vicuna_v1'")
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, a slow one, which does not tell where "
            "tokens lie in a text: give a folder with tokenizer.json"
        )
    picture = str(processor.image_token)
    ends = tokenizer.convert_ids_to_tokens(ends_of(loaded))
    if not ends:
        raise ValueError(
            "neither the tokenizer nor generation_config.json names a token that ends an answer: "
            "set eos_token in tokenizer_config.json"
        )
    has_template = style == "model" and getattr(processor, "chat_template", None)
    pieces = pieces_of(processor, picture, ends) if has_template else vicuna(picture, ends[0])
    expanded = _expanded(loaded, picture, size)
    added = tokenizer.added_tokens_decoder.values()
    named = [str(token) for token in added if token.special]
    specials = tuple(dict.fromkeys([*tokenizer.all_special_tokens, *named]))
    found = Conversation(tokenizer, pieces, picture, expanded, specials, max_length)
    _expect_room(found)
    return found


def ends_of(loaded: Loaded) -> list[int]:
    """Return the tokens that end an answer, the tokenizer's own first."""
    stated = loaded.lm.generation_config.eos_token_id
    listed = stated if isinstance(stated, list) else [stated]
    found = [loaded.processor.tokenizer.eos_token_id, *listed]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _expect_room(conversation: Conversation) -> None:
    """Refuse a length that leaves no room for a picture and a few words."""
    turns = (Turn("human", "?"), Turn("assistant", "!"))
    whole = replace(conversation, max_length=sys.maxsize)
    needed = len(whole.encode(Dialogue(turns, ("!",)), shows=True)[0])
    if needed > conversation.max_length:
        raise ValueError(
            f"max_length is {conversation.max_length} and a picture with one word takes {needed} "
            "tokens: give more"
        )


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
