"""The pictures of an image-text-to-text model: from uint8 squares to its forward pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcl.core import Batch
from mmcl.models.families import Family


class Pixels(nn.Module):
    """Normalises pictures on their device, or lets stored features stand in for them.

    Args:
        lm: the model.
        processor: its processor.
        family: what is known of its type.
        size: side of a picture; None = as its configuration says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, lm: Any, processor: Any, family: Family, size: int | None) -> None:
        super().__init__()
        self.family, self.images = family, processor.image_processor
        stated = getattr(lm.config.vision_config, "image_size", None) or family.size
        own = stated if isinstance(stated, int) else int(stated[0])
        self.size = own if size is None else size
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.images, f"image_{name}"), dtype=torch.float32)
            self.register_buffer(name, values.view(3, 1, 1) * 255, persistent=False)
        self.token = int(lm.config.image_token_id)
        takes = inspect.signature(lm.model.forward).parameters
        self._is_marked = "mm_token_type_ids" in takes
        self._has_door = "mm_encoder_outputs" in takes

    def marks(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return (B, L) which tokens stand for pictures, for models that ask."""
        if not self._is_marked:
            return {}
        return {"mm_token_type_ids": (tokens == self.token).long()}

    def inputs(self, lm: Any, batch: Batch) -> dict[str, Any]:
        """Return the arguments of a forward pass that bring pictures or features."""
        if batch.features is not None:
            return {"mm_encoder_outputs": {"image": self._projected(lm, batch.features)}}
        if batch.images is None:
            return {}
        weight = next(lm.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        if self.family.is_plain:
            pixels = (batch.images.to(self.mean.dtype) - self.mean) / self.std
            return {"pixel_values": pixels.to(dtype)}
        made = self.images(
            images=list(batch.images), return_tensors="pt", **self.family.pictures
        )  # fmt: skip
        device = batch.images.device
        kept = {k: v.to(device) for k, v in made.items() if isinstance(v, Tensor)}
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in kept.items()}

    def features(self, lm: Any, batch: Batch) -> Tensor:
        """Return (M, N, D), what enters the projector for each picture."""
        if batch.images is None:
            raise ValueError("rows have neither pictures nor features: give one of them")
        seen: list[Tensor] = []
        projector = lm.model.get_submodule(self.family.projector)
        hook = projector.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            lm.model.get_image_features(**self.inputs(lm, batch))
        finally:
            hook.remove()
        return seen[0].reshape(len(batch.images), -1, seen[0].shape[-1])

    def _projected(self, lm: Any, features: Tensor) -> BaseModelOutputWithPooling:
        if not (self.family.replays and self._has_door):
            raise ValueError(
                f"stored features cannot enter a model of type '{lm.config.model_type}': its "
                "vision tower ends in more than a projector; use raw replay (ExperienceReplay)"
            )
        projector = lm.model.get_submodule(self.family.projector)
        weight = next(projector.parameters())
        made = projector(features.to(weight.dtype))
        return BaseModelOutputWithPooling(pooler_output=list(made))
