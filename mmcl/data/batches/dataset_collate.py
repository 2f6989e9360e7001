"""Collate functions for a user's own datasets of (image, label) and (image, caption) pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from mmcl.core import Batch, ProcessedSample, Transform
from mmcl.core.image_values import ImagesAre, as_uint8, stack_images
from mmcl.data.batches.collate import draw_caption, hash_image, pad_texts
from mmcl.data.decode import rgb_array
from mmcl.data.stored_sample import hash_bytes


@dataclass(frozen=True)
class ImageLabelCollate:
    """Collate function for a dataset of (image, label) pairs, such as torchvision's.

    ``DataLoader(dataset, batch_size=32, collate_fn=ImageLabelCollate(model.transform(True)))``
    yields ``Batch``. Augmentation is seeded by torch's generator, which a DataLoader seeds in every
    worker.

    Attributes:
        transform: of the model, ``model.transform(train)``.
        task: index of the task that the samples come from.
    """

    transform: Transform
    task: int = 0

    def __call__(self, pairs: Sequence[Any], seeds: Sequence[int] | None = None) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image, a PIL image or a tensor (3, H, W) of uint8 or of floats from 0 to 1, of
                any size; and class index.
            seeds: B seeds of augmentation; None = drawn from torch's generator.
        """
        known = [_pair(item) for item in pairs]
        seeds = [_seed() for _ in pairs] if seeds is None else seeds
        images = [
            cast(Tensor, self.transform(_pixels(image), None, seed).image)
            for (image, _), seed in zip(known, seeds, strict=True)
        ]
        return Batch.from_images(images, [_label(label) for _, label in known], task=self.task)


@dataclass(frozen=True)
class ImageCaptionCollate:
    """Collate function for a dataset of (image, caption) pairs, such as torchvision's.

    Of an image with several captions, as in ``CocoCaptions``, one is drawn at random, or each is
    paired with the image.

    Attributes:
        transform: of the model, ``model.transform(train)``.
        task: index of the task that the samples come from.
        all_captions: make a pair of every caption of an image, as retrieval is evaluated; a batch
            then has as many samples as its images have captions.
    """

    transform: Transform
    task: int = 0
    all_captions: bool = False

    def __call__(self, pairs: Sequence[Any], seeds: Sequence[int] | None = None) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image as in ``ImageLabelCollate``; its caption, or a list of captions; and the
                identity of the image, a number or a text (also as key ``image_id``). Where it is
                left out, images of equal pixels are the same image.
            seeds: B seeds of the draw and of augmentation; None = from torch's generator.

        Raises:
            ValueError: if a sample has no caption, or the model has no tokenizer.
        """
        seeds = [_seed() for _ in pairs] if seeds is None else seeds
        samples: list[ProcessedSample] = []
        image_ids: list[int] = []
        for (image, given, stated), seed in zip(map(_captioned, pairs), seeds, strict=True):
            pixels = _pixels(image)
            texts = [draw_caption(given, seed)]
            if self.all_captions and not isinstance(given, str):
                texts = list(given)
            own = [self.transform(pixels, text, seed) for text in texts]
            samples += own
            image_ids += [_image_id(stated, pixels)] * len(own)
        if any(sample.input_ids is None for sample in samples):
            raise ValueError(
                "the transform gives no token ids: use model.transform(...) of a model with a "
                "tokenizer, or ImageLabelCollate for class labels"
            )
        input_ids, mask = pad_texts([sample.input_ids for sample in samples])
        images = [cast(Tensor, sample.image) for sample in samples]
        batch = Batch.from_images(images, task=self.task)
        return replace(
            batch, input_ids=input_ids, attention_mask=mask, image_ids=torch.tensor(image_ids)
        )


def collate_images(
    pairs: Sequence[Any], *, task: int = 0, images_are: ImagesAre | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
) -> Batch:  # fmt: skip
    """Collate (image, label) pairs of a dataset that has resized its images, as torchvision's can.

    ``DataLoader(dataset, batch_size=32, collate_fn=mmcl.collate_images)`` yields ``Batch``;
    ``functools.partial`` sets arguments. ``ImageLabelCollate`` applies the model's own transform.

    Args:
        pairs: B pairs (or mappings with "image" and "label"): an image, (3, H, W) uint8 or floating
            or a PIL image, all of one size; and a class index.
        task: index of the task that the samples come from.
        images_are: as in ``Batch.from_images``, with ``mean`` and ``std``.
        mean: of the three channels.
        std: of the three channels.

    Raises:
        ValueError: if an item is no pair, sizes differ, or the images are not ``images_are``.
    """
    known = [_pair(item) for item in pairs]
    images = stack_images([_tensor(image) for image, _ in known])
    labels = [_label(label) for _, label in known]
    return Batch.from_images(images, labels, task=task, images_are=images_are, mean=mean, std=std)


def collate_captions(
    pairs: Sequence[Any], *, tokenizer: Callable[[Sequence[str]], Tensor], task: int = 0,
    images_are: ImagesAre | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Batch:  # fmt: skip
    """Collate (image, caption) pairs of a dataset that has resized its images.

    Use it as ``functools.partial(mmcl.collate_captions, tokenizer=model.tokenizer)``. Of several
    captions of an image one is drawn by torch's generator.

    Args:
        pairs: as in ``collate_images``, with a caption or a list of captions for the label, and
            perhaps the identity of the image, as in ``ImageCaptionCollate``.
        tokenizer: as in ``Batch.from_texts``.
        task: index of the task that the samples come from.
        images_are: as in ``Batch.from_images``, with ``mean`` and ``std``.
        mean: of the three channels.
        std: of the three channels.

    Raises:
        ValueError: if an item is no pair, a caption is missing, sizes differ, or the images are not
            ``images_are``.
    """
    known = [_captioned(item) for item in pairs]
    images = stack_images([_tensor(image) for image, _, _ in known])
    texts = [draw_caption(text, _seed()) for _, text, _ in known]
    batch = Batch.from_texts(
        texts, images, tokenizer=tokenizer, task=task, images_are=images_are, mean=mean, std=std
    )
    pixels = cast(Tensor, batch.images)
    ids = [_image_id(stated, own) for (_, _, stated), own in zip(known, pixels, strict=True)]
    return replace(batch, image_ids=torch.tensor(ids))


def _captioned(item: Any) -> tuple[Any, Any, Any]:
    """Return image, caption or captions, and stated identity of the image, None if not stated."""
    if isinstance(item, tuple | list) and len(item) == 3:
        return item[0], item[1], item[2]
    stated = item.get("image_id") if isinstance(item, Mapping) else None
    return (*_pair(item), stated)


def _image_id(stated: Any, pixels: Tensor) -> int:
    """Return the identity of an image in [0, 2**63): what is stated, else a hash of its pixels."""
    if stated is None:
        return hash_image(pixels.contiguous().numpy().data)
    if isinstance(stated, str):
        return hash_bytes(stated.encode()) >> 1
    if isinstance(stated, bool) or not hasattr(stated, "__index__") or int(stated) < 0:
        raise ValueError(
            f"an image_id is {stated!r}, expected a whole number from 0 or a text: items are "
            "(image, caption, image_id), or leave it out"
        )
    return int(stated)


def _pair(item: Any) -> tuple[Any, Any]:
    """Return the image and the label or text of a dataset's item."""
    if isinstance(item, Mapping) and "image" in item:
        for name in ("label", "labels", "caption", "text"):
            if name in item:
                return item["image"], item[name]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    has = f"keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else "no two parts"
    raise ValueError(
        f"an item of the dataset is {type(item).__name__} with {has}, expected (image, label) or a "
        "mapping with 'image' and 'label': write a collate_fn that returns mmcl.Batch.from_images"
    )


def _label(label: Any) -> int:
    if isinstance(label, str) or not hasattr(label, "__int__"):
        raise ValueError(
            f"a label is {label!r}, expected a class index: map names to 0, 1, ... in the order of "
            "model.set_classes"
        )
    return int(label)


def _tensor(image: Any) -> Tensor:
    return image if isinstance(image, Tensor) else _pixels(image)


def _pixels(image: Any) -> Tensor:
    """Pixels (3, H, W) uint8 of a PIL image, by the rules of files (`rgb_array`), or a tensor."""
    if isinstance(image, Tensor):
        return as_uint8(image)
    if not hasattr(image, "convert"):
        raise ValueError(
            f"an image is {type(image).__name__}, expected a PIL image or a tensor (3, H, W): give "
            "the dataset a transform that makes one"
        )
    return torch.from_numpy(rgb_array(image)).permute(2, 0, 1).contiguous()


def _seed() -> int:
    return int(torch.randint(1 << 31, ()))
