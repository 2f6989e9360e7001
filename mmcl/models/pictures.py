"""What a CLIP-style model does to one sample: resize, augment, tokenise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Dialogue, Row
from mmcl.core.randomness import generator


@dataclass(frozen=True)
class ClipTransform:
    """Bring a picture to the model's size in uint8 and a text to token numbers.

    Resizing is torch's antialiased bicubic one on uint8. Training takes a random crop
    (open_clip's default: area ``crop`` of the picture, aspect 3/4 to 4/3); testing resizes the
    shorter side and cuts the middle.

    Attributes:
        size: side of the square picture.
        tokenizer: text -> (1, L) int64, or None for models without captions.
        crop: smallest area share of a training crop, 0 to 1; None = as at test.
        flip: mirror half of the training pictures.
    """

    size: int
    tokenizer: Callable[[str], Tensor] | None = None
    crop: float | None = None
    flip: bool = False

    def __call__(self, pixels: Tensor | None, text: str | Dialogue | None, seed: int) -> Row:
        """Return the row; see ``mmcl.core.Transform``."""
        if isinstance(text, Dialogue):
            raise TypeError(
                "a CLIP takes classes and captions and got a dialogue: a stream of kind 'answer' "
                "needs a model that generates, such as mmcl.models.ImageTextToText"
            )
        image = None
        if pixels is not None:
            image = self._middle(pixels) if self.crop is None else self._crop(pixels, seed)
        tokens = None
        if text is not None and self.tokenizer is not None:
            tokens = self.tokenizer(text)[0]
            tokens = tokens[: int((tokens != 0).sum())]
        return Row(image, tokens)

    def _middle(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        short = min(height, width)
        top, left = (height - short) // 2, (width - short) // 2
        return self._resize(pixels[:, top : top + short, left : left + short])

    def _crop(self, pixels: Tensor, seed: int) -> Tensor:
        height, width = pixels.shape[1:]
        area, aspect, down, right, mirror = torch.rand(5, generator=generator(seed)).tolist()
        share = self.crop + (1 - self.crop) * area if self.crop is not None else 1.0
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        tall = min(height, max(1, round(math.sqrt(share * height * width / ratio))))
        wide = min(width, max(1, round(math.sqrt(share * height * width * ratio))))
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        image = self._resize(pixels[:, top : top + tall, left : left + wide])
        return image.flip(2) if self.flip and mirror < 0.5 else image

    def _resize(self, pixels: Tensor) -> Tensor:
        if pixels.shape[1:] == (self.size, self.size):
            return pixels.contiguous()
        return functional.interpolate(
            pixels[None], (self.size, self.size), mode="bicubic", antialias=True
        )[0]
