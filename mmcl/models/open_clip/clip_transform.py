"""Image and text transform of an open_clip model.

A file of its own, since workers run it without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Conversation, ProcessedSample
from mmcl.core.seeding import generator


@dataclass(frozen=True)
class ClipTransform:
    """Resize an image to the model's size in uint8 and tokenize a text.

    Resizing is torch's antialiased bicubic one on uint8. Training takes a random crop
    (open_clip's default: area ``random_crop_scale`` of the image, aspect 3/4 to 4/3);
    evaluation takes the center crop.

    Attributes:
        size: side of the square image.
        tokenizer: text -> (1, L) int64, or None for models without captions.
        random_crop_scale: smallest area fraction of a training crop, 0 to 1; None = center crop.
        horizontal_flip: mirror half of the training images.
    """

    size: int
    tokenizer: Callable[[str], Tensor] | None = None
    random_crop_scale: float | None = None
    horizontal_flip: bool = False

    def __call__(
        self, pixels: Tensor | None, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Return the processed sample; see ``mmcl.core.Transform``."""
        if isinstance(text, Conversation):
            raise TypeError(
                "a CLIP takes classes and captions and got a conversation: a stream of task_type "
                "'instruction' needs a generative model, such as mmcl.models.ImageTextToText"
            )
        image = None if pixels is None else self._image(pixels, seed)
        tokens = None
        if text is not None and self.tokenizer is not None:
            tokens = self.tokenizer(text)[0]
            tokens = tokens[: int((tokens != 0).sum())]
        return ProcessedSample(image, tokens)

    def _image(self, pixels: Tensor, seed: int) -> Tensor:
        height, width = pixels.shape[1:]
        if self.random_crop_scale is None:
            short = min(height, width)
            top, left = (height - short) // 2, (width - short) // 2
            return self._resize(pixels[:, top : top + short, left : left + short])
        area, aspect, down, right, mirror = torch.rand(5, generator=generator(seed)).tolist()
        fraction = self.random_crop_scale + (1 - self.random_crop_scale) * area
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        tall = min(height, max(1, round(math.sqrt(fraction * height * width / ratio))))
        wide = min(width, max(1, round(math.sqrt(fraction * height * width * ratio))))
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        image = self._resize(pixels[:, top : top + tall, left : left + wide])
        return image.flip(2) if self.horizontal_flip and mirror < 0.5 else image

    def _resize(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] == (self.size, self.size):
            return pixels.contiguous()
        return functional.interpolate(
            pixels[None], (self.size, self.size), mode="bicubic", antialias=True
        )[0]
