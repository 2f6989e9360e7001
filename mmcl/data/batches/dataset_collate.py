"""Collate functions that make batches of plain (image, label) and (image, caption) datasets.

A file of its own, for users with a torchvision dataset and a DataLoader who need no stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Batch, Transform
from mmcl.core.batch import as_uint8


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

    def __call__(self, pairs: Sequence[tuple[Any, int]]) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image, a PIL image or a tensor (3, H, W) of uint8 or of floats from 0 to 1, of
                any size; and class index.
        """
        images = [self.transform(_pixels(image), None, _seed()).image for image, _ in pairs]
        labels = [int(label) for _, label in pairs]
        return Batch.from_images(cast("list[Tensor]", images), labels, task=self.task)


@dataclass(frozen=True)
class ImageCaptionCollate:
    """Collate function for a dataset of (image, caption) pairs, such as torchvision's.

    Of an image with several captions, as in ``CocoCaptions``, one is drawn at random.

    Attributes:
        transform: of the model, ``model.transform(train)``.
        task: index of the task that the samples come from.
    """

    transform: Transform
    task: int = 0

    def __call__(self, pairs: Sequence[tuple[Any, str | Sequence[str]]]) -> Batch:
        """Batch of B pairs.

        Args:
            pairs: image as in ``ImageLabelCollate``; and its caption, or a list of captions.

        Raises:
            ValueError: if a sample has no caption, or the model has no tokenizer.
        """
        samples = [self.transform(_pixels(i), _one_of(text), _seed()) for i, text in pairs]
        token_ids = [sample.tokens for sample in samples]
        if any(ids is None for ids in token_ids):
            raise ValueError(
                "the transform gives no token ids: use model.transform(...) of a model with a "
                "tokenizer, or ImageLabelCollate for class labels"
            )
        known = cast("list[Tensor]", token_ids)
        lengths = torch.tensor([len(ids) for ids in known])
        input_ids = pad_sequence(known, batch_first=True)
        mask = torch.arange(input_ids.shape[1])[None] < lengths[:, None]
        images = [cast(Tensor, sample.image) for sample in samples]
        batch = Batch.from_images(images, task=self.task)
        return replace(batch, input_ids=input_ids, attention_mask=mask)


def _pixels(image: Any) -> Tensor:
    """Pixels (3, H, W) uint8 of a PIL image or a tensor."""
    if isinstance(image, Tensor):
        return as_uint8(image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _one_of(texts: str | Sequence[str]) -> str:
    if isinstance(texts, str):
        return texts
    if not texts:
        raise ValueError("a sample has an empty list of captions: give it one, or leave it out")
    return texts[int(torch.randint(len(texts), ()))]


def _seed() -> int:
    return int(torch.randint(1 << 31, ()))
