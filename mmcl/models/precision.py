"""In which numbers the weights of a large model are held."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from mmcl.models.families import FAMILIES, Family

Precision = Literal["fp32", "bf16", "8bit", "4bit"]
_ALL = (Family(), *FAMILIES.values())


def weight_options(precision: Precision, pretrained: bool) -> dict[str, Any]:
    """Return the options of ``from_pretrained`` or ``from_config``.

    Quantised weights go straight to the GPU of this process (LOCAL_RANK). ``.to`` of that device on
    a module around them, as trainers call it, leaves them; transformers refuses to cast them.

    Raises:
        ValueError: if the name is unknown, or random weights are to be quantised.
        RuntimeError: if quantisation has no GPU or no bitsandbytes.
    """
    if precision in ("fp32", "bf16"):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        return {"dtype": dtype, "attn_implementation": "sdpa"}
    if precision not in ("8bit", "4bit"):
        raise ValueError(
            f"base_precision is {precision!r}, expected 'fp32', 'bf16', '8bit' or '4bit'"
        )
    if not pretrained:
        raise ValueError(
            f"base_precision is '{precision}' and pretrained is false: random weights cannot be "
            "quantised; use 'fp32' or 'bf16'"
        )
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"base_precision is '{precision}' and this machine has no GPU that torch can use: "
            "quantised weights are computed on a GPU; use 'bf16' or 'fp32' here"
        )
    rank = os.environ.get("LOCAL_RANK")
    device = torch.cuda.current_device() if rank is None else int(rank)
    return {
        "quantization_config": _quantised(precision), "device_map": {"": device},
        "dtype": torch.bfloat16, "attn_implementation": "sdpa",
    }  # fmt: skip


def _quantised(precision: Precision) -> Any:
    if not is_bitsandbytes_available():
        raise RuntimeError(
            f"base_precision is '{precision}' and bitsandbytes is not installed: "
            "pip install bitsandbytes, or use 'bf16'"
        )
    # Only the language model is quantised: a projector that learns cannot be, and a vision tower
    # is small. The head is left out by name, as naming modules takes it off transformers' own list.
    names = {name for family in _ALL for name in (family.projector, family.tower)}
    whole = ["lm_head", *sorted(f"model.{name}" for name in names)]
    if precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=whole,
    )  # fmt: skip
