"""What differs between the image-text-to-text models of transformers, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """How models of one ``model_type`` take pictures.

    Attributes:
        projector: dotted name, inside ``model.model``, of what maps picture to word features.
        tower: dotted name of the vision tower there.
        language: dotted name of the language model there.
        pictures: options of the image processor for pictures that already have the model's size.
        is_plain: pictures are only normalised, (M, 3, S, S); done here instead of there.
        replays: stored projector inputs can stand in for pictures.
        has_plain_positions: token positions count up by one, so that a prefix can be read once.
        size: side of pictures where the model's configuration states none.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    pictures: Mapping[str, Any] = field(default_factory=dict)
    is_plain: bool = False
    replays: bool = False
    has_plain_positions: bool = True
    size: int = 336


_QWEN = Family(
    projector="visual.merger", tower="visual", pictures={"do_resize": False},
    has_plain_positions=False, size=448,
)  # fmt: skip
_SMOL = Family(
    projector="connector", tower="vision_model", language="text_model",
    pictures={"do_resize": False, "do_image_splitting": False}, replays=True,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": Family(
            pictures={"do_resize": False, "do_center_crop": False}, is_plain=True, replays=True
        ),
        "llava_onevision": Family(size=384),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "idefics3": _SMOL,
        "smolvlm": _SMOL,
        "internvl": Family(
            pictures={"crop_to_patches": False, "do_resize": False}, replays=True, size=448
        ),
    }
)


def family_of(model: nn.Module) -> Family:
    """Return what is known of a model's type; the names of LLaVA where nothing is."""
    config: Any = model.config
    return FAMILIES.get(str(config.model_type), Family())
