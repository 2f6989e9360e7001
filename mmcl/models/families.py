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
        axes: 4 or 5 where pixels are only normalised, (M, 3, S, S) or (1, M, 3, S, S), which is
            done here on the pictures' device; 0 where the image processor has to.
        replays: stored projector inputs can stand in for pictures.
        is_stacked: projected pictures are one tensor, not a list.
        has_one_size: pictures have the size in the configuration and no other.
        step: sides are a multiple of these numbers of ``vision_config``, multiplied.
        size: side of pictures where the model's configuration states none.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    pictures: Mapping[str, Any] = field(default_factory=dict)
    axes: int = 0
    replays: bool = False
    is_stacked: bool = False
    has_one_size: bool = False
    step: tuple[str, ...] = ()
    size: int = 336


_QWEN = Family(
    projector="visual.merger", tower="visual", pictures={"do_resize": False},
    step=("patch_size", "spatial_merge_size"), size=448,
)  # fmt: skip
_SMOL = Family(
    projector="connector", tower="vision_model", language="text_model",
    pictures={"do_resize": False, "do_image_splitting": False}, axes=5, replays=True,
    has_one_size=True,
)  # fmt: skip
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llava": Family(
            pictures={"do_resize": False, "do_center_crop": False}, axes=4, replays=True,
            has_one_size=True,
        ),
        "llava_onevision": Family(size=384),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "idefics3": _SMOL,
        "smolvlm": _SMOL,
        "internvl": Family(
            pictures={"crop_to_patches": False, "do_resize": False}, axes=4, replays=True,
            is_stacked=True, has_one_size=True, size=448,
        ),
    }
)  # fmt: skip


def family_of(model: nn.Module) -> Family:
    """Return what is known of a model's type; the names of LLaVA where nothing is.

    Raises:
        ValueError: if the model has no parts of these names.
    """
    config: Any = model.config
    inner: Any = getattr(model, "model", None)
    found = FAMILIES.get(str(config.model_type), Family())
    parts = {name for name, _ in inner.named_modules()} if inner is not None else set()
    missing = [n for n in (found.tower, found.projector, found.language) if n not in parts]
    if missing:
        raise ValueError(
            f"a model of type '{config.model_type}' has no {missing[0]}, and its parts are not "
            f"known here: use one of type {', '.join(FAMILIES)}"
        )
    return found
