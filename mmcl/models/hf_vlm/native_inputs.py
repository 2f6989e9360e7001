"""Native image inputs: a model's own processor in the loader, and its outputs joined to a batch.

The processor of transformers decides how an image is resized, cut into tiles and written as tokens.
It is run for each sample in the loader's workers, so a batch may mix images of any number and size.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
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


_BLANK_SIDE, _TEST_SIZES = 64, ((300, 500), (96, 64))
_ALIKE, _MAX_BLANK, _KEPT_COUNTS = 32, 4_000_000, 1 << 16
"""Sides of blank images are multiples of the first; they have no more pixels than the second."""


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

    def count_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return about how many tokens the images of one sample become, by height and width.

        transformers' own formula is used where it gives what the processor makes of a test image;
        else a blank image is processed, once for sizes that are alike.
        """
        if self.is_joint and len(sizes) > 1:
            return sum(self._blank_tokens([(_BLANK_SIDE, _BLANK_SIDE)] * 2)) * len(sizes) // 2
        return sum(map(self._count, sizes))

    def _count(self, size: tuple[int, int]) -> int:
        if size not in self._counts:
            if len(self._counts) == _KEPT_COUNTS:
                self._counts.clear()
            if self._has_formula:
                self._counts[size] = self._by_formula(size)
            else:
                alike = _alike(size)
                if alike not in self._counts:
                    try:
                        self._counts[alike] = self._blank_tokens([alike])[0]
                    except Exception:  # processors refuse some shapes, each in a way of its own
                        self._counts[alike] = 0
                self._counts[size] = self._counts[alike]
        return self._counts[size]

    @cached_property
    def _counts(self) -> dict[tuple[int, int], int]:
        return {}

    @cached_property
    def _has_formula(self) -> bool:
        """Whether transformers counts the tokens of test images as its processor makes them."""
        for size in _TEST_SIZES:
            try:
                counted = self._by_formula(size)
            # A private method, which some families lack and others change.
            except (AttributeError, KeyError, TypeError, ValueError, IndexError):
                return False
            if abs(counted - self._blank_tokens([size])[0]) > max(1, counted // 50):
                return False
        return True

    def _by_formula(self, size: tuple[int, int]) -> int:
        found = self.processor._get_num_multimodal_tokens(image_sizes=[size])
        return int(found["num_image_tokens"][0])

    def _blank_tokens(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Return the number of tokens of each of the blank images of a sample."""
        blank = [torch.zeros(3, *size, dtype=torch.uint8) for size in sizes]
        encode = self.processor.tokenizer.encode
        return [len(encode(text, add_special_tokens=False)) for text in self(blank)[1]]

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: counts stay in the process that groups samples."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

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

    @property
    def tokens_per_image(self) -> None:
        """None: the number of tokens of an image depends on its size."""
        return

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return about how many tokens images of these (height, width) become in one sample."""
        return self.native.count_tokens(sizes)

    def _for_routing(self, images: Sequence[Tensor]) -> Tensor | None:
        if self.routing_transform is None or not images:
            return None
        made = [self.routing_transform(image, None, 0).image for image in images]
        return torch.stack([image for image in made if image is not None])


def _alike(size: tuple[int, int]) -> tuple[int, int]:
    """Return a size whose sides are rounded up, or shrunk where it has very many pixels."""
    factor = min(1.0, math.sqrt(_MAX_BLANK / max(1, size[0] * size[1])))
    height, width = (max(1, -(-int(side * factor) // _ALIKE)) * _ALIKE for side in size)
    return height, width


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
