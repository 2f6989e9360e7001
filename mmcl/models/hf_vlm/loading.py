"""Loading and saving of generative VLMs of transformers, and their chat tokenizers."""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
)
from transformers.utils import is_bitsandbytes_available, logging

from mmcl.core import Conversation, Turn
from mmcl.models.hf_vlm.architectures import ARCHITECTURES, Architecture, architecture_of
from mmcl.models.hf_vlm.chat_template import (
    ChatTemplate,
    ConvTemplate,
    pin_date,
    pinned_date,
    reads_date,
    template_source,
)
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer, TooLong, reserved_token_ids
from mmcl.models.hf_vlm.native_inputs import process_images
from mmcl.models.hf_vlm.prompts_and_gates import GateReplayContext
from mmcl.models.open_clip.loading import one_line, quiet_hub_access

TINY_LLAVA = Path(__file__).parent.parent / "tiny_llava"
DType = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["8bit", "4bit"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedVLM:
    """Loaded model of transformers and its processor."""

    lm: Any
    processor: Any


def load_vlm(
    model: str,
    pretrained: bool,
    seed: int,
    *,
    dtype: DType | None = None,
    quantization: Quantization | None = None,
) -> LoadedVLM:
    """Load a model and its processor.

    Arguments are those of ``ImageTextToText``.

    Raises:
        FileNotFoundError: if a local folder or its config.json does not exist.
        ValueError: if dtype or quantization is unknown, or the processor takes no images.
        RuntimeError: if weights cannot be loaded or downloaded, or quantization has no GPU.
    """
    source = _local_or_hub(model)
    options = weight_options(dtype, quantization, pretrained)
    try:
        with quiet_hub_access(), without_progress_bars():
            processor = AutoProcessor.from_pretrained(source)
            if pretrained:
                lm = AutoModelForImageTextToText.from_pretrained(source, **options)
            else:
                lm = _random_weights(source, options, seed)
    except Exception as error:  # every hub client raises errors of its own
        raise RuntimeError(_unavailable(model, source, error)) from error
    missing = [n for n in ("tokenizer", "image_processor") if not hasattr(processor, n)]
    if missing:
        raise ValueError(
            f"the processor of {model} is a {type(processor).__name__} without {missing[0]}: give "
            "a model of transformers that takes images and generates text"
        )
    return LoadedVLM(lm, processor)


def _local_or_hub(model: str) -> str:
    """Return the local folder or hub name of a model; a FileNotFoundError if it is neither."""
    if model == "tiny-llava":
        return str(TINY_LLAVA)
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"the folder {model} holds a peft adapter{_base_of(path)}: give that base as "
                f"model, and mmcl.strategies.LoRA(adapter='{model}') to train it further, or with "
                "adapter_mode 'merge' to begin a new adapter"
            )
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {model} has no config.json: give one that save_pretrained of a model "
                "and of its processor wrote"
            )
        return str(path)
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {model}: give a local folder as transformers writes them, "
            "'tiny-llava', or a name on the hub such as 'llava-hf/llava-1.5-7b-hf'"
        )
    return model


def _base_of(folder: Path) -> str:
    """Return the base model that a peft adapter names, in words."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return f" of base '{config['base_model_name_or_path']}'"
    except (ValueError, OSError, KeyError, TypeError):
        return ""


def _unavailable(model: str, source: str, error: Exception) -> str:
    reason = one_line(error)
    if "Unrecognized configuration class" in reason:
        kind = re.search(r"\.(\w+)Config'", reason)
        return (
            f"{model} is {f'a {kind[1]}' if kind else 'another model'}, which takes no images or "
            f"generates no text: use one of type {', '.join(ARCHITECTURES)}"
        )
    if isinstance(error, ImportError):
        return f"cannot load {model} ({reason}): install what is missing"
    if Path(source).is_dir():
        return (
            f"cannot load {model} ({reason}): the folder must hold config.json, weights, "
            "tokenizer.json and processor files as save_pretrained writes them"
        )
    return (
        f"cannot get {model} ({reason}): check the name on the hub; without a network give a local "
        "folder with config.json, weights and processor files as transformers writes them"
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers in this context."""
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _random_weights(source: str, options: dict[str, Any], seed: int) -> nn.Module:
    config = AutoConfig.from_pretrained(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm: nn.Module = AutoModelForImageTextToText.from_config(config, **options)
    return lm.eval()


def make_chat_tokenizer(
    loaded: LoadedVLM, conv_template: ConvTemplate, max_length: int, too_long: TooLong = "drop"
) -> ChatTokenizer:
    """Return the chat tokenizer of a model; arguments are those of ``ImageTextToText``.

    Raises:
        ValueError: if the tokenizer is a slow one, or the template cannot be used.
    """
    processor, tokenizer = loaded.processor, loaded.processor.tokenizer
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, a slow one, which returns no offsets "
            "of tokens in a text: give a folder with tokenizer.json"
        )
    ends = tokenizer.convert_ids_to_tokens(eos_token_ids(loaded))
    if not ends:
        raise ValueError(
            "neither the tokenizer nor generation_config.json names a token that ends an answer: "
            "set eos_token in tokenizer_config.json"
        )
    template = ChatTemplate.of(processor, ends, conv_template)
    reserved = reserved_token_ids(processor, loaded.lm.config, template)
    return ChatTokenizer(tokenizer, template, reserved, max_length, too_long)


def eos_token_ids(loaded: LoadedVLM) -> list[int]:
    """Return the tokens that end an answer, the tokenizer's own first."""
    declared = loaded.lm.generation_config.eos_token_id
    listed = declared if isinstance(declared, list) else [declared]
    found = [loaded.processor.tokenizer.eos_token_id, *listed]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def pin_template_date(processor: Any, conv_template: ConvTemplate, day: str | None) -> str | None:
    """Pin the dates that a processor's chat template writes to one day, wherever it is rendered.

    Args:
        processor: of transformers; its ``chat_template`` is replaced.
        conv_template: argument of ``ImageTextToText``.
        day: in ISO format; None = the day to which it is pinned already, or today.

    Returns:
        the day, or None if the template writes no date.

    Raises:
        ValueError: if a day is given and the template writes no date, or it cannot be pinned.
    """
    source = template_source(processor) if conv_template == "model" else None
    pinned = None if source is None else pinned_date(source)
    if source is None or not (pinned or reads_date(source)):
        if day is not None:
            raise ValueError(
                f"template_date is {day!r}, and the chat template writes no date: leave it out"
            )
        return None
    if pinned is not None and day is None:
        warnings.warn(
            f"the chat template of this model writes the date {pinned}, to which it was pinned in "
            "training: template_date sets another",
            stacklevel=2,
        )
        return pinned
    day = date.today().isoformat() if day is None else day
    processor.chat_template = pin_date(source, day)
    return day


def expect_image_fits(chat_tokenizer: ChatTokenizer, placeholders: str) -> None:
    """Check that an image, given by its tokens as a text, with one word fits the length limit.

    Raises:
        ValueError: if it takes more than ``max_length``.
    """
    turns = (Turn("user", "?"), Turn("assistant", "!"))
    unlimited = replace(chat_tokenizer, max_length=sys.maxsize)
    needed = len(unlimited.encode(Conversation(turns, ("!",)), [placeholders]).input_ids)
    if needed > chat_tokenizer.max_length:
        raise ValueError(
            f"max_length is {chat_tokenizer.max_length} and an image with one word takes {needed} "
            f"tokens: give at least {needed}"
        )


def image_placeholders(loaded: LoadedVLM, size: int) -> str:
    """Return the text by which the processor replaces the image token of one image of this size."""
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    options = dict(architecture_of(loaded.lm).image_options)
    return process_images(loaded.processor, [blank], **options)[1][0]


def weight_options(
    dtype: DType | None, quantization: Quantization | None, pretrained: bool
) -> dict[str, Any]:
    """Return the dtype and quantization options of ``from_pretrained`` or ``from_config``.

    Quantized weights go straight to the GPU of this process (LOCAL_RANK). A trainer's ``.to`` of
    that device leaves them unchanged; transformers refuses to cast them.

    Arguments are those of ``ImageTextToText``.

    Raises:
        ValueError: if dtype or quantization is unknown, or random weights would be quantized.
        RuntimeError: if quantization has no GPU or no bitsandbytes.
    """
    name = dtype or ("float32" if quantization is None else "bfloat16")
    if name not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}, expected 'float32', 'bfloat16' or 'float16'")
    # transformers takes torch's fused attention where the model has it; Gemma 2 has not.
    options: dict[str, Any] = {"dtype": _DTYPES[name]}
    if quantization is None:
        return options
    if quantization not in ("8bit", "4bit"):
        raise ValueError(f"quantization is {quantization!r}, expected '8bit', '4bit' or null")
    if not pretrained:
        raise ValueError(
            f"quantization is '{quantization}' and pretrained is false: random weights cannot be "
            "quantized; leave quantization out"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"quantization is '{quantization}' and this machine has no GPU that torch can use: "
            "quantized weights need a GPU; use dtype 'bfloat16' without quantization here"
        )
    rank = os.environ.get("LOCAL_RANK")
    device = torch.cuda.current_device() if rank is None else int(rank)
    config = _quantization_config(quantization, _DTYPES[name])
    return {**options, "quantization_config": config, "device_map": {"": device}}


def _quantization_config(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    if not is_bitsandbytes_available():
        raise RuntimeError(
            f"quantization is '{quantization}' and bitsandbytes is not installed: "
            "pip install 'mmcl[quantized]', or use dtype 'bfloat16' without quantization"
        )
    # Only the language model is quantized: a trainable projector cannot be, and a vision tower is
    # small. The head is listed too, because a list of our own replaces that of transformers.
    known = (Architecture(), *ARCHITECTURES.values())
    names = {name for one in known for name in (one.projector, one.tower)}
    skipped = ["lm_head", *sorted(f"model.{name}" for name in names)]
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype, llm_int8_skip_modules=skipped,
    )  # fmt: skip


def enable_gradient_checkpointing(lm: Any, gates: MutableMapping[str, Tensor]) -> None:
    """Enable gradient checkpointing; the second pass reads the first one's gates of experts."""
    # transformers 5 renames this method and warns of the old name.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(lm, name) for name in names if hasattr(lm, name))
    enable({"use_reentrant": False, "context_fn": GateReplayContext(gates)})


def plain_model(lm: Any, state: Mapping[str, Tensor]) -> Any:
    """Build a model like ``lm`` without adapters around given weights, which are not copied.

    The state has all weights, under their names without adapters.

    Raises:
        RuntimeError: if a weight is missing or unknown.
    """
    # On the meta device no random weights are made, which would be replaced at once.
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    plain.load_state_dict(dict(state), strict=True, assign=True)
    plain.tie_weights()
    buffers = dict(lm.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:
            owner, _, last = name.rpartition(".")
            plain.get_submodule(owner)._buffers[last] = buffers[name].clone()
    plain.generation_config = copy.deepcopy(lm.generation_config)
    return plain.eval()


def plain_weight_names(lm: Any) -> set[str]:
    """Return the names of all weights of a model without adapters."""
    with torch.device("meta"):
        return set(type(lm)(copy.deepcopy(lm.config)).state_dict())


def save_pretrained(lm: Any, processor: Any, folder: Path) -> None:
    """Write configuration, weights and processor."""
    with without_progress_bars():
        lm.save_pretrained(folder)
        processor.save_pretrained(folder)
