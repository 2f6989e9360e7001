"""Values of images: uint8 levels from floats and normalized floats, and checks of an input.

A file of its own: the batch, the collate functions and the models share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

ImagesAre = Literal["uint8", "unit", "normalized"]
"""What the values of images are: levels from 0 to 255, floats from 0 to 1, or normalized floats."""


def as_uint8(
    images: Tensor,
    images_are: ImagesAre | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Images as uint8 levels from 0 to 255, rounded.

    Args:
        images: (..., 3, H, W) uint8 or floating.
        images_are: see ``Batch.from_images``.
        mean: of the three channels, for "normalized".
        std: of the three channels, for "normalized".

    Raises:
        ValueError: if the values are not what ``images_are`` says, or the type is another.
    """
    if images_are not in (None, *get_args(ImagesAre)):
        raise ValueError(f"images_are is '{images_are}': choose {', '.join(get_args(ImagesAre))}")
    if images.dtype == torch.uint8 and images_are in (None, "uint8"):
        return images
    if not images.is_floating_point():
        kind = f" and images_are is '{images_are}'" if images_are else ""
        raise ValueError(f"images are {images.dtype}{kind}: give uint8, or floats from 0 to 1")
    if images_are == "normalized":
        if mean is None or std is None:
            raise ValueError(
                "images_are is 'normalized' without mean and std: give those of Normalize, which "
                "is undone, or leave Normalize out of the transform"
            )
        images = images * _per_channel("std", std, images) + _per_channel("mean", mean, images)
    top = 255.0 if images_are == "uint8" else 1.0
    # Interpolation of floats may overshoot the range a little.
    slack = 0.1 if images_are == "normalized" else 0.0
    low, high = float(images.min()), float(images.max())
    if not (low >= -slack and high <= top + slack):
        raise ValueError(_range_error(low, high, images_are))
    return images.clamp(0, top).mul(255 / top).round().to(torch.uint8)


def stack_images(images: Sequence[Tensor]) -> Tensor:
    """Stack images (3, H, W) of one size to (B, 3, H, W).

    Raises:
        ValueError: if their sizes differ.
    """
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) != 1:
        raise ValueError(
            f"the images of a batch have sizes {', '.join(map(str, sizes[:3])) or 'of no image'}: "
            "bring them to the model's, for example by "
            "collate_fn=mmcl.ImageLabelCollate(model.transform(True))"
        )
    return torch.stack(list(images))


def _range_error(low: float, high: float, images_are: str | None) -> str:
    found = f"images range from {low:.2f} to {high:.2f}"
    if images_are == "normalized":
        return f"{found} after Normalize is undone, expected 0 to 1: mean or std are not its own"
    if images_are is not None:
        return f"{found} and images_are is '{images_are}': choose what they are"
    return (
        f"{found}, expected 0 to 1: if they are normalized, leave Normalize out of the transform "
        "(the model normalizes on its device) or give images_are='normalized' with its mean and "
        "std; if they are levels from 0 to 255, give images_are='uint8'"
    )


def _per_channel(name: str, values: Sequence[float], images: Tensor) -> Tensor:
    if len(values) != 3:
        raise ValueError(f"{name} has {len(values)} numbers: give one for each of three channels")
    return torch.tensor(list(values), dtype=images.dtype, device=images.device).view(3, 1, 1)


def expect_levels(images: Tensor, size: int | tuple[int, int] | None = None) -> None:
    """Check that images are what a model normalizes: uint8 levels, of the model's size.

    Args:
        images: (M, 3, H, W).
        size: side of the model's square images, or (height, width); None = any.

    Raises:
        ValueError: if they are floats, which would be normalized as if they were levels, or of
            another size.
    """
    if images.is_floating_point():
        raise ValueError(
            f"the batch's images are {images.dtype}, expected uint8: the model normalizes levels "
            "from 0 to 255, so make the batch with mmcl.Batch.from_images(images, images_are=...)"
        )
    if size is None:
        return
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] != (height, width):
        raise ValueError(
            f"the batch's images are {images.shape[-2]} x {images.shape[-1]}, this model takes "
            f"{height} x {width}: resize them, for example by "
            "collate_fn=mmcl.ImageLabelCollate(model.transform(True))"
        )
