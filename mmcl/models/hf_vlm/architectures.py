"""Architecture table of transformers' image-text-to-text models: module names and image inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Architecture of one ``model_type``: names of its modules and form of its image inputs.

    Attributes:
        projector: dotted name, inside ``model.model``, of the projector from image to word
            features.
        tower: dotted name of the vision tower there.
        language: dotted name of the language model there.
        image_options: options of the image processor for images that already have the model's size.
        pixel_axes: 4 or 5 where images are only normalized, to (M, 3, S, S) or (1, M, 3, S, S),
            which is done here on the images' device; 0 where the image processor has to.
        takes_features: stored projector inputs can replace images.
        is_stacked: projected images are one tensor, not a list.
        has_one_size: only the image size of the configuration is supported.
        size_step: numbers of ``vision_config`` whose product divides the image size.
        default_size: image size where the configuration has none.
    """

    projector: str = "multi_modal_projector"
    tower: str = "vision_tower"
    language: str = "language_model"
    image_options: Mapping[str, Any] = field(default_factory=dict)
    pixel_axes: int = 0
    takes_features: bool = False
    is_stacked: bool = False
    has_one_size: bool = False
    size_step: tuple[str, ...] = ()
    default_size: int = 336


_QWEN = Architecture(
    projector="visual.merger", tower="visual", image_options={"do_resize": False},
    size_step=("patch_size", "spatial_merge_size"), default_size=448,
)  # fmt: skip
_SMOL = Architecture(
    projector="connector", tower="vision_model", language="text_model",
    image_options={"do_resize": False, "do_image_splitting": False}, pixel_axes=5,
    takes_features=True, has_one_size=True,
)  # fmt: skip
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "llava": Architecture(
            image_options={"do_resize": False, "do_center_crop": False}, pixel_axes=4,
            takes_features=True, has_one_size=True,
        ),
        "llava_onevision": Architecture(default_size=384),
        "qwen2_vl": _QWEN,
        "qwen2_5_vl": _QWEN,
        "idefics3": _SMOL,
        "smolvlm": _SMOL,
        "internvl": Architecture(
            image_options={"crop_to_patches": False, "do_resize": False}, pixel_axes=4,
            takes_features=True, is_stacked=True, has_one_size=True, default_size=448,
        ),
    }
)  # fmt: skip


def architecture_of(model: nn.Module) -> Architecture:
    """Return the architecture entry for ``model.config.model_type``.

    An unknown type gets LLaVA's module names.

    Raises:
        ValueError: if the model has no modules of these names.
    """
    config: Any = model.config
    inner: Any = getattr(model, "model", None)
    found = ARCHITECTURES.get(str(config.model_type), Architecture())
    modules = {name for name, _ in inner.named_modules()} if inner is not None else set()
    missing = [n for n in (found.tower, found.projector, found.language) if n not in modules]
    if missing:
        raise ValueError(
            f"a model of type '{config.model_type}' has no {missing[0]}, and its module names are "
            f"not known here: use one of type {', '.join(ARCHITECTURES)}"
        )
    return found
