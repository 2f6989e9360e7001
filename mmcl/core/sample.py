"""Row and Transform: how one decoded sample becomes what a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Row:
    """A sample as its model takes it.

    Attributes:
        image: (3, H, W) uint8 at the model's size, or None.
        tokens: (L,) int64 without padding after the end token, or None.
    """

    image: Tensor | None
    tokens: Tensor | None = None


class Transform(Protocol):
    """What a model does to one sample; picklable, so that loader workers can run it."""

    def __call__(self, pixels: Tensor | None, text: str | None, seed: int) -> Row:
        """Resize and augment a picture, tokenise a text.

        Args:
            pixels: (3, H, W) uint8 as decoded, any size.
            text: caption, or None where the task has none.
            seed: of this sample's augmentation, the same whenever the sample is met in the same
                epoch, on any rank and in any worker.
        """
        ...
