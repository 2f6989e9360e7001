"""Images of a generative VLM: from pixels to uint8 squares, and to inputs of its forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcl.core import Batch, Conversation, Pixels, ProcessedSample, each_image
from mmcl.core.image_values import expect_levels
from mmcl.core.master_weights import compute_dtype
from mmcl.core.model import eval_mode
from mmcl.models.hf_vlm.architectures import Architecture
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer
from mmcl.models.hf_vlm.native_inputs import NativeProcessor, expect_conversation, join_inputs
from mmcl.models.hf_vlm.vision_layers import UsedLayers

ImageAspectRatio = Literal["pad", "crop", "stretch"]
ImageMode = Literal["native", "square"]
_BLANK_SIDE = 64


def takes_native_inputs(
    model: str, mode: ImageMode | None, ratio: ImageAspectRatio | None, size: int | None
) -> bool:
    """Return whether the model's own processor makes the image inputs; arguments as given."""
    square = {"image_aspect_ratio": ratio, "size": size}
    given = [f"{name} {value!r}" for name, value in square.items() if value is not None]
    if mode not in (None, *get_args(ImageMode)):
        raise ValueError(f"image_inputs is {mode!r}, expected 'native' or 'square'")
    if mode == "native" and given:
        raise ValueError(
            f"image_inputs is 'native' and {' and '.join(given)} is for 'square': give one of them"
        )
    return mode == "native" or (mode is None and model != "tiny-llava" and not given)


@dataclass(frozen=True)
class LlavaTransform:
    """Resize an image to one square size in uint8 and tokenize a conversation.

    Training and evaluation do the same: published codes that pad in one and crop in the other lose
    accuracy by that alone.

    Attributes:
        chat_tokenizer: of the model.
        placeholders: tokens of one image, as a text.
        size: side of the square image.
        image_aspect_ratio: "pad" to a square with ``fill`` (LLaVA-1.5), "crop" the center, or
            "stretch".
        fill: color of the padding, 0 to 255.
        is_training: whether samples that are too long for the model are left out or noted.
    """

    chat_tokenizer: ChatTokenizer
    placeholders: str
    size: int
    image_aspect_ratio: ImageAspectRatio = "pad"
    fill: tuple[int, int, int] = (122, 116, 104)
    is_training: bool = True

    def __post_init__(self) -> None:
        """Check ``image_aspect_ratio``."""
        if self.image_aspect_ratio not in ("pad", "crop", "stretch"):
            raise ValueError(
                f"image_aspect_ratio is {self.image_aspect_ratio!r}, expected 'pad', 'crop' or "
                "'stretch'"
            )

    def __call__(
        self, pixels: Pixels, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Return the processed sample; see ``mmcl.core.Transform``."""
        dialogue = expect_conversation(text)
        images = [self._square(image) for image in each_image(pixels)]
        placeholders = [self.placeholders] * len(images)
        encoded = self.chat_tokenizer.encode(dialogue, placeholders, in_training=self.is_training)
        image = torch.stack(images) if len(images) > 1 else images[0] if images else None
        return ProcessedSample(image, encoded.input_ids, encoded.labels, note=encoded.note)

    @cached_property
    def tokens_per_image(self) -> int:
        """Number of tokens of an image, whatever its size."""
        return len(
            self.chat_tokenizer.tokenizer.encode(self.placeholders, add_special_tokens=False)
        )

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the number of tokens of images of these (height, width)."""
        return self.tokens_per_image * len(sizes)

    def _square(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        if height != width and self.image_aspect_ratio == "pad":
            pixels = self._padded(pixels)
        elif height != width and self.image_aspect_ratio == "crop":
            short = min(height, width)
            top, left = (height - short) // 2, (width - short) // 2
            pixels = pixels[:, top : top + short, left : left + short]
        if pixels.shape[1:] == (self.size, self.size):
            return pixels.contiguous()
        return functional.interpolate(
            pixels[None], (self.size, self.size), mode="bicubic", antialias=True
        )[0]

    def _padded(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        side = max(height, width)
        canvas = torch.tensor(self.fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[:, top : top + height, left : left + width] = pixels
        return canvas


class ImageInputs:
    """Image inputs: normalizes images on their device, or projects stored features instead.

    Images are in the order of their samples.

    Args:
        lm: model of transformers.
        processor: its processor.
        architecture: architecture of its type.
        size: side of a square image; None = as in the model's configuration.
        is_native: whether the model's own processor makes the inputs, in the loader.

    Attributes:
        size: side of a square image.
        mean: of normalization, 0 to 255; float32 whatever the model is cast to.
        std: of normalization, 0 to 255.
        image_token_id: placeholder token; an image has one or more.
        used_layers: layers of the vision tower that are read.

    Raises:
        ValueError: if the model takes no images of this size.
    """

    def __init__(
        self, lm: Any, processor: Any, architecture: Architecture, size: int | None,
        *, is_native: bool = False,
    ) -> None:  # fmt: skip
        self.is_native = is_native
        self.architecture, self._processor = architecture, processor.image_processor
        self.size = _image_size(lm.config, architecture, size)
        self.mean = [255.0 * value for value in self._processor.image_mean]
        self.std = [255.0 * value for value in self._processor.image_std]
        self.image_token_id = int(lm.config.image_token_id)
        self._stats: dict[torch.device, Tensor] = {}
        self.native = NativeProcessor.of(lm, processor, architecture)
        arguments = inspect.signature(lm.model.forward).parameters
        known = ("mm_token_type_ids", "token_type_ids")
        self._arguments = frozenset(arguments)
        self._token_types = [name for name in known if name in arguments]
        self._takes_encoder_outputs = "mm_encoder_outputs" in arguments
        self.used_layers = UsedLayers(lm, architecture)

    @property
    def description(self) -> str:
        """Description of the preprocessing, for the fingerprint."""
        if self.is_native:
            return self.native.description
        return f"{self.size} {self.mean} {self.std} {dict(self.architecture.image_options)}"

    @property
    def takes_features(self) -> bool:
        """Whether encoded images can enter in place of pixels."""
        return self.architecture.takes_features and self._takes_encoder_outputs

    def token_type_ids(self, tokens: Tensor, in_answer: Tensor | None = None) -> dict[str, Tensor]:
        """Return the types of tokens (B, L), for models that take them.

        They are 1 for image placeholders; in models with prefix attention, 1 from the first answer
        on.

        Args:
            tokens: (B, L) tokens.
            in_answer: (B, L) bool, True from each sample's first answer on; None = questions alone.
        """
        types = tokens == self.image_token_id
        if self.architecture.has_prefix_attention:
            types = torch.zeros_like(types) if in_answer is None else in_answer
        return dict.fromkeys(self._token_types, types.long())

    def forward_kwargs(self, lm: Any, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the forward pass with images or stored features."""
        if batch.features is not None:
            features = batch.features
            if batch.input_ids is not None:  # a sample without an image has features of zeros
                features = features[(batch.input_ids == self.image_token_id).any(1)]
            if not len(features):
                return {}
            return {"mm_encoder_outputs": {"image": self._projected(lm, features)}}
        inputs = self._pixel_kwargs(lm, batch)
        return {**inputs, **self.used_layers.arguments(lm, inputs)} if inputs else {}

    def _pixel_kwargs(self, lm: Any, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the forward pass with images."""
        images = batch.images
        dtype = compute_dtype(lm.model.get_submodule(self.architecture.tower))
        if batch.image_inputs:
            joined = join_inputs(batch.image_inputs, batch, self._arguments)
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in joined.items()}
        if images is None or not len(images):
            return {}
        if self.architecture.pixel_axes:
            expect_levels(images)
            mean, std = self._mean_std(images.device)
            pixels = images.float().sub_(mean).div_(std).to(dtype)
            return {"pixel_values": pixels if self.architecture.pixel_axes == 4 else pixels[None]}
        options = self.architecture.image_options
        processed = self._processor(images=list(images), return_tensors="pt", **options)
        moved = {k: v.to(images.device) for k, v in processed.items() if isinstance(v, Tensor)}
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in moved.items()}

    def features(self, lm: Any, batch: Batch) -> Tensor:
        """Return the projector inputs (M, N, D) of M images, with the tower in evaluation mode.

        Raises:
            ValueError: if there are no images.
        """
        inputs = self.forward_kwargs(lm, batch)
        if not batch.has_images or not inputs:
            raise ValueError("the batch has neither images nor features: give one of them")
        captured: list[Tensor] = []
        projector = lm.model.get_submodule(self.architecture.projector)
        hook = projector.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
        try:
            tower = lm.model.get_submodule(self.architecture.tower)
            with eval_mode(tower), self.used_layers.only(lm):
                lm.model.get_image_features(**inputs)
        finally:
            hook.remove()
        count = len(batch.image_inputs) if batch.images is None else len(batch.images)
        return captured[0].reshape(count, -1, captured[0].shape[-1])

    def mean_features(self, lm: Any, batch: Batch) -> Tensor:
        """Return the mean projector input (M, D) of each of M images, float32."""
        if not batch.image_inputs:
            return self.features(lm, batch).float().mean(1)
        # One by one: the number of features differs, and some towers mix the images of a call.
        owners = batch.image_owner
        if owners is None or not self.architecture.is_joint:
            owners = torch.arange(len(batch.image_inputs), device=batch.labels.device)
        means = []
        for owner in sorted(set(owners.tolist())):
            rows = torch.nonzero(owners == owner).flatten()
            inputs = tuple(batch.image_inputs[row] for row in rows.tolist())
            label, own = batch.labels.new_zeros(1), torch.zeros_like(rows)
            one = Batch(None, label, label, image_owner=own, image_inputs=inputs)
            means.append(self.features(lm, one).float().mean(1))
        return torch.cat(means)

    def blank_features(self, lm: Any) -> Tensor:
        """Return the projector input (1, N, D) of a black image."""
        device = next(lm.parameters()).device
        label = torch.zeros(1, dtype=torch.int64, device=device)
        if self.is_native:
            inputs, _ = self.native([torch.zeros(3, _BLANK_SIDE, _BLANK_SIDE, dtype=torch.uint8)])
            batch = Batch(None, label, label, image_inputs=inputs).to(device)
        else:
            images = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=device)
            batch = Batch(images, label, label)
        with torch.no_grad():
            return self.features(lm, batch)

    def expect_feature_input(self, model_type: str) -> None:
        """Check that stored features can replace images.

        Raises:
            ValueError: if more than a projector follows the vision tower.
            RuntimeError: if the installed transformers takes no features.
        """
        if not self.architecture.takes_features:
            raise ValueError(
                f"stored features cannot enter a model of type '{model_type}': more than a "
                "projector follows its vision tower; use raw replay (ExperienceReplay)"
            )
        if not self._takes_encoder_outputs:
            raise RuntimeError(
                "stored features enter as mm_encoder_outputs, an argument that the installed "
                "transformers does not have: install a newer one, or use raw replay "
                "(ExperienceReplay)"
            )

    def _projected(self, lm: Any, features: Tensor) -> BaseModelOutputWithPooling:
        self.expect_feature_input(lm.config.model_type)
        projector = lm.model.get_submodule(self.architecture.projector)
        projected = projector(features.to(compute_dtype(projector)))
        return BaseModelOutputWithPooling(
            pooler_output=projected if self.architecture.is_stacked else list(projected)
        )

    def _mean_std(self, device: torch.device) -> Tensor:
        """Return mean and standard deviation (2, 3, 1, 1) on a device."""
        if device not in self._stats:
            self._stats[device] = torch.tensor([self.mean, self.std], device=device)
        return self._stats[device].view(2, 3, 1, 1)


def _image_size(config: Any, architecture: Architecture, size: int | None) -> int:
    declared = getattr(config.vision_config, "image_size", None) or architecture.default_size
    own = declared if isinstance(declared, int) else int(declared[0])
    if size is None:
        return own
    if architecture.has_one_size and size != own:
        raise ValueError(
            f"size is {size}, but this model takes images of size {own} only: leave size out"
        )
    parts = [(config.vision_config, config, name) for name in architecture.size_step]
    step = prod(
        int(getattr(tower, name, 0) or getattr(whole, name)) for tower, whole, name in parts
    )
    if size < 1 or size % step:
        raise ValueError(f"size is {size}, expected a multiple of {step} for this model")
    return size
