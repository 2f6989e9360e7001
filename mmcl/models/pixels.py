"""The pictures of an image-text-to-text model: from uint8 squares to its forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcl.core import Batch
from mmcl.models.families import Family


class Pixels:
    """Normalises pictures on their device, or lets stored features stand in for them.

    Pictures are in the order of their rows.

    Args:
        lm: the model.
        processor: its processor.
        family: what is known of its type.
        size: side of a picture; None = as its configuration says.

    Attributes:
        size: side of a picture.
        mean: of normalised colours, 0 to 255; float32 whatever the model is cast to.
        std: of normalised colours.
        token: stands in a row for a part of a picture.

    Raises:
        ValueError: if the model takes no pictures of this size.
    """

    def __init__(self, lm: Any, processor: Any, family: Family, size: int | None) -> None:
        self.family, self.images = family, processor.image_processor
        self.size = _side(lm.config, family, size)
        self.mean = [255.0 * value for value in self.images.image_mean]
        self.std = [255.0 * value for value in self.images.image_std]
        self.token = int(lm.config.image_token_id)
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        takes = inspect.signature(lm.model.forward).parameters
        self._is_marked = "mm_token_type_ids" in takes
        self._has_door = "mm_encoder_outputs" in takes

    @property
    def facts(self) -> str:
        """What is done to a picture, in words, for a fingerprint."""
        return f"{self.size} {self.mean} {self.std} {dict(self.family.pictures)}"

    def marks(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return (B, L) which tokens stand for pictures, for models that ask."""
        if not self._is_marked:
            return {}
        return {"mm_token_type_ids": (tokens == self.token).long()}

    def inputs(self, lm: Any, batch: Batch) -> dict[str, Any]:
        """Return the arguments of a forward pass that bring pictures or features."""
        if batch.features is not None:
            features = batch.features
            if batch.tokens is not None:  # a row of text alone has features of zeros
                features = features[(batch.tokens == self.token).any(1)]
            if not len(features):
                return {}
            return {"mm_encoder_outputs": {"image": self._projected(lm, features)}}
        images = batch.images
        if images is None or not len(images):
            return {}
        dtype = _dtype(lm.model.get_submodule(self.family.tower).parameters())
        if self.family.axes:
            mean, std = self._colours(images.device)
            pixels = images.float().sub_(mean).div_(std).to(dtype)
            return {"pixel_values": pixels if self.family.axes == 4 else pixels[None]}
        made = self.images(images=list(images), return_tensors="pt", **self.family.pictures)
        kept = {k: v.to(images.device) for k, v in made.items() if isinstance(v, Tensor)}
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in kept.items()}

    def features(self, lm: Any, batch: Batch) -> Tensor:
        """Return (M, N, D), what enters the projector for each picture.

        Raises:
            ValueError: if there are no pictures.
        """
        inputs = self.inputs(lm, batch)
        if batch.images is None or not inputs:
            raise ValueError("rows have neither pictures nor features: give one of them")
        seen: list[Tensor] = []
        projector = lm.model.get_submodule(self.family.projector)
        hook = projector.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        try:
            lm.model.get_image_features(**inputs)
        finally:
            hook.remove()
        return seen[0].reshape(len(batch.images), -1, seen[0].shape[-1])

    def blank(self, lm: Any) -> Tensor:
        """Return (1, N, D), what enters the projector for a black picture."""
        device = next(lm.parameters()).device
        images = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=device)
        label = torch.zeros(1, dtype=torch.int64, device=device)
        with torch.no_grad():
            return self.features(lm, Batch(images, label, label))

    def expect_replay(self, kind: str) -> None:
        """Refuse stored features where they cannot enter.

        Args:
            kind: ``model_type``, for the error.

        Raises:
            ValueError: if the vision tower ends in more than a projector.
            RuntimeError: if the transformers that is installed has no door for features.
        """
        if not self.family.replays:
            raise ValueError(
                f"stored features cannot enter a model of type '{kind}': its vision tower ends in "
                "more than a projector; use raw replay (ExperienceReplay)"
            )
        if not self._has_door:
            raise RuntimeError(
                "stored features enter through mm_encoder_outputs, which this transformers has "
                "not: install a newer one, or use raw replay (ExperienceReplay)"
            )

    def _projected(self, lm: Any, features: Tensor) -> BaseModelOutputWithPooling:
        self.expect_replay(lm.config.model_type)
        projector = lm.model.get_submodule(self.family.projector)
        made = projector(features.to(_dtype(projector.parameters())))
        return BaseModelOutputWithPooling(
            pooler_output=made if self.family.is_stacked else list(made)
        )

    def _colours(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            made = [torch.tensor(of, device=device).view(3, 1, 1) for of in (self.mean, self.std)]
            self._on[device] = (made[0], made[1])
        return self._on[device]


def _side(config: Any, family: Family, size: int | None) -> int:
    stated = getattr(config.vision_config, "image_size", None) or family.size
    own = stated if isinstance(stated, int) else int(stated[0])
    if size is None:
        return own
    if family.has_one_size and size != own:
        raise ValueError(
            f"size is {size}, and this model was made for pictures of {own}: leave size out"
        )
    step = prod(int(getattr(config.vision_config, name)) for name in family.step)
    if size < 1 or size % step:
        raise ValueError(f"size is {size}, expected a multiple of {step} for this model")
    return size


def _dtype(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """Return the type of the first weight that is not quantised."""
    kinds = (parameter.dtype for parameter in parameters if parameter.is_floating_point())
    return next(kinds, torch.bfloat16)
