"""Preprocessing of one sample for a generative VLM: a square image, a tokenized conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Conversation, ProcessedSample
from mmcl.models.hf_vlm.chat_template import ChatTokenizer

ImageAspectRatio = Literal["pad", "crop", "stretch"]


@dataclass(frozen=True)
class LlavaTransform:
    """Resize an image to one square size in uint8 and tokenize a conversation.

    Training and evaluation do the same: published codes that pad in one and crop in the other lose
    accuracy by that alone.

    Attributes:
        chat_tokenizer: of the model.
        size: side of the square image.
        image_aspect_ratio: "pad" to a square with ``fill`` (LLaVA-1.5), "crop" the center, or
            "stretch".
        fill: color of the padding, 0 to 255.
    """

    chat_tokenizer: ChatTokenizer
    size: int
    image_aspect_ratio: ImageAspectRatio = "pad"
    fill: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self) -> None:
        """Check ``image_aspect_ratio``."""
        if self.image_aspect_ratio not in ("pad", "crop", "stretch"):
            raise ValueError(
                f"image_aspect_ratio is {self.image_aspect_ratio!r}, expected 'pad', 'crop' or "
                "'stretch'"
            )

    def __call__(
        self, pixels: Tensor | None, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Return the processed sample; see ``mmcl.core.Transform``."""
        if not isinstance(text, Conversation):
            raise TypeError(
                f"a generative model takes conversations and got {type(text).__name__}: use it on "
                "tasks of task_type 'instruction', or OpenCLIP for classes and captions"
            )
        image = None if pixels is None else self._square(pixels)
        tokens, labels = self.chat_tokenizer.tokenize(text, image is not None)
        return ProcessedSample(image, tokens, labels)

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
