"""Image and text transform of an open_clip model.

A file of its own, since workers run it without the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmcl.core import Conversation, Pixels, ProcessedSample
from mmcl.core.padding import real_tokens
from mmcl.core.seeding import generator

_MAX_ASPECT = 16
"""An image longer than this, resized by its shorter side, would take gigabytes."""


@dataclass(frozen=True)
class ClipTransform:
    """Resize an image to the model's size in uint8 and tokenize a text.

    Evaluation is open_clip's ``image_transform_v2`` for the same ``PreprocessCfg``, without the
    normalization, which the model does on its device. Resizing is torch's antialiased one on uint8:
    an image that is not resized, or only cropped or padded, is equal to the bit; a resized one
    differs from that of Pillow 13 by rounding, at most 2 of 255 levels and 0.1 on average. (Pillow
    before 13 always resizes the width first, which clips the overshoot of edges elsewhere.)

    Training takes a random crop as open_clip's default does (area ``random_crop_scale`` to 1 of the
    image, aspect 3/4 to 4/3), whatever the ``resize_mode``. A side that is longer than the image is
    cut, where torchvision draws again; and the crop is resized with the model's ``interpolation``,
    where open_clip's is always bicubic.

    Attributes:
        size: side of a square image in pixels, or (height, width).
        tokenizer: text -> (1, L) int64, or None for models without captions.
        random_crop_scale: smallest area fraction of a training crop, 0 to 1; None = as in
            evaluation.
        horizontal_flip: mirror half of the training images.
        interpolation: "random" is one of the other two, drawn for every training crop; bicubic in
            evaluation.
        resize_mode: in evaluation, "shortest" resizes the shorter side to the size and takes the
            center crop, "longest" resizes the longer side and pads the shorter one, and "squash"
            resizes both sides, whatever the aspect.
        fill_color: level of the padding of "longest", 0 to 255.
        pad_id: token that the tokenizer pads with.
    """

    size: int | tuple[int, int]
    tokenizer: Callable[[str], Tensor] | None = None
    random_crop_scale: float | None = None
    horizontal_flip: bool = False
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0
    pad_id: int = 0

    def __call__(
        self, pixels: Pixels, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Return the processed sample; see ``mmcl.core.Transform``."""
        if isinstance(text, Conversation):
            raise TypeError(
                "a CLIP takes classes and captions and got a conversation: a stream of task_type "
                "'instruction' needs a generative model, such as mmcl.models.ImageTextToText"
            )
        if isinstance(pixels, tuple):
            raise ValueError(f"got {len(pixels)} images for one text: a CLIP takes one a sample")
        image = None
        if pixels is not None:
            is_random = self.random_crop_scale is not None
            image = self._random_crop(pixels, seed) if is_random else self._whole(pixels)
        tokens = None
        if text is not None and self.tokenizer is not None:
            padded = self.tokenizer(text)
            tokens = padded[0, : int(real_tokens(padded, self.pad_id).sum())]
        return ProcessedSample(image, tokens)

    @property
    def _height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def _random_crop(self, pixels: Tensor, seed: int) -> Tensor:
        smallest, random = self.random_crop_scale or 0.0, generator(seed)
        area, aspect, down, right, mirror = torch.rand(5, generator=random).tolist()
        height, width = pixels.shape[1:]
        fraction = smallest + (1 - smallest) * area
        ratio = math.exp((2 * aspect - 1) * math.log(4 / 3))
        tall = min(height, max(1, round(math.sqrt(fraction * height * width / ratio))))
        wide = min(width, max(1, round(math.sqrt(fraction * height * width * ratio))))
        top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
        mode = self.interpolation
        if mode == "random":
            is_bilinear = torch.rand(1, generator=random).item() < 0.5
            mode = "bilinear" if is_bilinear else "bicubic"
        image = _scaled(pixels[:, top : top + tall, left : left + wide], self._height_width, mode)
        return image.flip(2) if self.horizontal_flip and mirror < 0.5 else image

    def _whole(self, pixels: Tensor) -> Tensor:
        """Return the image as in evaluation."""
        target, mode = self._height_width, self.interpolation
        if self.resize_mode == "squash":
            return _resize(pixels, target, mode)
        if self.resize_mode == "longest":
            (height, width), (tall, wide) = pixels.shape[1:], target
            ratio = max(height / tall, width / wide)
            sides = max(1, round(height / ratio)), max(1, round(width / ratio))
            return _center(_resize(pixels, sides, mode), target, self.fill_color)
        longest = _MAX_ASPECT * min(pixels.shape[1:])
        if max(pixels.shape[1:]) > longest:
            height, width = pixels.shape[1:]
            pixels = _center(pixels, (min(height, longest), min(width, longest)))
        if target[0] != target[1]:
            mode = "bicubic"  # as open_clip, which drops the interpolation here
        return _center(_resize(pixels, _shortest(pixels, target), mode), target)


def _shortest(pixels: Tensor, target: tuple[int, int]) -> tuple[int, int]:
    """Return the size of an image whose shorter side, relative to the target, is the target's."""
    (height, width), (tall, wide) = pixels.shape[1:], target
    if tall == wide:  # rounded down, as in torchvision's Resize
        short = min(height, width)
        return (tall * height // short, tall * width // short)
    ratio = min(height / tall, width / wide)
    return round(height / ratio), round(width / ratio)


def _resize(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Resize in Pillow's order: width first, unless the height shrinks by far more pixels."""
    (height, width), (tall, wide) = pixels.shape[1:], size
    if tall < height and height - tall > 2 * (width - wide):
        pixels = _scaled(pixels, (tall, width), mode)
    return _scaled(pixels, size, mode)


def _scaled(pixels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    if tuple(pixels.shape[1:]) == size:
        return pixels.contiguous()
    mode = "bilinear" if mode == "bilinear" else "bicubic"
    # Torch resizes a crop, whose lines are apart in memory, in nearly twice the time of a copy.
    dense = pixels[None].contiguous(memory_format=torch.channels_last)
    return functional.interpolate(dense, size, mode=mode, antialias=True)[0]


def _center(pixels: Tensor, size: tuple[int, int], fill: int = 0) -> Tensor:
    """Cut or pad (C, H, W) pixels evenly on both sides, rounded as torchvision does."""
    for axis, wanted in ((1, size[0]), (2, size[1])):
        extra = pixels.shape[axis] - wanted
        if extra > 0:
            pixels = pixels.narrow(axis, round(extra / 2), wanted)
        elif extra < 0:
            before, after = -extra // 2, (1 - extra) // 2
            sides = (0, 0, before, after) if axis == 1 else (before, after, 0, 0)
            pixels = functional.pad(pixels, sides, value=fill)
    return pixels.contiguous()
