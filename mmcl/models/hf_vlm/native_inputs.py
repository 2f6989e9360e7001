"""Native image inputs: a model's own processor in the loader, and its outputs joined to a batch.

The processor of transformers decides how an image is resized, cut into tiles and written as tokens.
It is run for each sample in the loader's workers, so a batch may mix images of any number and size.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Batch, Conversation, Pixels, ProcessedSample, Transform, each_image
from mmcl.models.hf_vlm.architectures import Architecture
from mmcl.models.hf_vlm.chat_tokenizer import ChatTokenizer

_TEXT_NAMES = frozenset({
    "input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids",
    "batch_num_images",
})  # fmt: skip
"""Outputs of a processor that are made here: from the tokens, or from the whole batch."""


@dataclass(frozen=True)
class NativeProcessor:
    """Processor of transformers, for the images of one sample; can be pickled.

    Attributes:
        processor: of the model.
        names: arguments of the model's forward pass; other outputs of the processor are dropped.
        is_joint: whether all images of a sample are processed in one call, because their number
            changes how each is cut (LLaVA-OneVision).
    """

    processor: Any
    names: frozenset[str]
    is_joint: bool = False

    @classmethod
    def of(cls, lm: Any, processor: Any, architecture: Architecture) -> NativeProcessor:
        """Return the processor of a model of transformers."""
        names = frozenset(inspect.signature(type(lm).forward).parameters) - _TEXT_NAMES
        return cls(processor, names, architecture.is_joint)

    def __call__(
        self, images: Sequence[Tensor]
    ) -> tuple[tuple[Mapping[str, Tensor], ...], list[str]]:
        """Process m images (3, H, W) of one sample.

        Returns:
            arguments of the forward pass for each image, and the placeholder tokens of each, as a
            text.
        """
        if self.is_joint and len(images) > 1:
            outputs, texts = self._processed(images)
            rows = [slice(number, number + 1) for number in range(len(images))]
            return tuple({n: v[row] for n, v in outputs.items()} for row in rows), texts
        each = [self._processed([image]) for image in images]
        return tuple(outputs for outputs, _ in each), [text for _, own in each for text in own]

    @property
    def description(self) -> str:
        """Description of the preprocessing, for the fingerprint."""
        return f"native {self.processor.image_processor.to_json_string()}"

    def _processed(self, images: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        found, texts = process_images(self.processor, images)
        return {name: value for name, value in found.items() if name in self.names}, texts


def process_images(
    processor: Any, images: Sequence[Tensor], **options: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors that a processor makes of the images of one sample, and the text of each.

    Args:
        processor: of transformers.
        images: m images (3, H, W) uint8.
        options: of its image processor.

    Raises:
        ValueError: if it does not say by which text it replaces the mark of an image.
    """
    marks = [processor.image_token * len(images)]
    with warnings.catch_warnings():
        # PaliGemma's warns of its own numpy calls.
        warnings.simplefilter("ignore", DeprecationWarning)
        found = processor(
            text=marks, images=[list(images)], return_tensors="pt",
            return_text_replacement_offsets=True, **options,
        )  # fmt: skip
    replaced = found.get("text_replacement_offsets") or [()]
    if len(replaced[0]) != len(images):
        raise ValueError(
            f"the {type(processor).__name__} names {len(replaced[0])} texts for {len(images)} "
            "images, and one for each is needed: use a family of the table in docs/families.md"
        )
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return tensors, [str(each["replacement"]) for each in replaced[0]]


def expect_conversation(text: str | Conversation | None) -> Conversation:
    """Return the conversation that a generative model's transform is given.

    Raises:
        TypeError: if it is a caption or nothing.
    """
    if not isinstance(text, Conversation):
        raise TypeError(
            f"a generative model takes conversations and got {type(text).__name__}: use it on "
            "tasks of task_type 'instruction', or OpenCLIP for classes and captions"
        )
    return text


@dataclass(frozen=True)
class NativeTransform:
    """Run a model's own processor on the images of a sample and tokenize its conversation.

    Attributes:
        chat_tokenizer: of the model.
        native: processor of the model.
        routing_transform: transform of a routing encoder, whose image goes along; None = none.
        is_training: whether samples that are too long for the model are left out or noted.
    """

    chat_tokenizer: ChatTokenizer
    native: NativeProcessor
    routing_transform: Transform | None = None
    is_training: bool = True

    def __call__(
        self, pixels: Pixels, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Return the processed sample; see ``mmcl.core.Transform``."""
        dialogue = expect_conversation(text)
        images = each_image(pixels)
        inputs, texts = self.native(images)
        encoded = self.chat_tokenizer.encode(dialogue, texts, in_training=self.is_training)
        return ProcessedSample(
            self._for_routing(images), encoded.input_ids, encoded.labels, inputs, encoded.note
        )

    def _for_routing(self, images: Sequence[Tensor]) -> Tensor | None:
        if self.routing_transform is None or not images:
            return None
        made = [self.routing_transform(image, None, 0).image for image in images]
        return torch.stack([image for image in made if image is not None])


def join_inputs(
    each: Sequence[Mapping[str, Tensor]], batch: Batch, names: frozenset[str]
) -> dict[str, Tensor]:
    """Join what a processor made of M images, in order, to the arguments of one forward pass.

    Tiles are put one behind another, without padding between images; images of different sizes are
    padded on the right and at the bottom, which a model that takes them cuts off by their sizes.

    Args:
        each: outputs of ``NativeProcessor`` for M images.
        batch: whose images they are.
        names: arguments of the forward pass.
    """
    joined: dict[str, Tensor] = {}
    is_masked = "pixel_attention_mask" in each[0] and each[0]["pixel_values"].dim() == 5
    for name, first in each[0].items():
        parts = [inputs[name] for inputs in each]
        if is_masked:
            joined[name] = torch.cat(_padded(parts), dim=1)
        elif name == "pixel_values" and first.dim() == 5:
            joined[name] = torch.cat([part.flatten(0, 1) for part in parts])
        else:
            joined[name] = torch.cat(_padded(parts) if first.dim() >= 4 else parts)
    if "batch_num_images" in names:
        owner = batch.image_owner
        counts = batch.labels.new_ones(len(each)) if owner is None else owner.bincount()
        joined["batch_num_images"] = counts[counts > 0]
    return joined


def _padded(parts: Sequence[Tensor]) -> list[Tensor]:
    """Pad the last two axes, height and width, with zeros to the largest."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return [
        functional.pad(part, (0, width - part.shape[-1], 0, height - part.shape[-2]))
        for part in parts
    ]
