"""What an image-text-to-text model does to one sample: a square picture, a tokenised dialogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Dialogue, Row
from mmcl.models.conversation import Conversation

Fit = Literal["pad", "crop", "stretch"]


@dataclass(frozen=True)
class SquareTransform:
    """Bring a picture to one square size in uint8 and a dialogue to tokens.

    The same in training and at test: published codes that pad in one and crop in the other lose
    points to that alone.

    Attributes:
        conversation: of the model.
        size: side of the square picture.
        fit: "pad" to a square with ``fill`` (LLaVA-1.5), "crop" the middle, or "stretch".
        fill: colour of the padding, 0 to 255.
    """

    conversation: Conversation
    size: int
    fit: Fit = "pad"
    fill: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self) -> None:
        """Check the fit."""
        if self.fit not in ("pad", "crop", "stretch"):
            raise ValueError(f"fit is {self.fit!r}, expected 'pad', 'crop' or 'stretch'")

    def __call__(self, pixels: Tensor | None, text: str | Dialogue | None, seed: int) -> Row:
        """Return the row; see ``mmcl.core.Transform``."""
        if not isinstance(text, Dialogue):
            raise TypeError(
                f"a model that answers takes dialogues and got {type(text).__name__}: use it on "
                "tasks of kind 'answer', or OpenCLIP for classes and captions"
            )
        image = None if pixels is None else self._square(pixels)
        tokens, labels = self.conversation.encode(text, image is not None)
        return Row(image, tokens, labels)

    def _square(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[1:]
        if height != width and self.fit == "pad":
            pixels = self._padded(pixels)
        elif height != width and self.fit == "crop":
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
