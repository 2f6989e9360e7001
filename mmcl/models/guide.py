"""A frozen CLIP that embeds the pictures and questions of a generative model's batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Batch, Modality


@torch.no_grad()
def guided(guide: Any, batch: Batch, modality: Modality) -> Tensor:
    """Return (B, E) unit embeddings by the guide.

    Args:
        guide: a dual encoder such as ``OpenCLIP``.
        batch: with pictures of any square size, and references that hold the questions.
        modality: "image", or "text" for the last question of each row.

    Raises:
        ValueError: if rows have stored features in place of pictures, or no references.
    """
    if modality == "text":
        return _questions(guide, batch)
    if batch.features is not None:
        raise ValueError(
            "the guide needs pictures and these rows have features in their place: route without "
            "FeatureReplay, or leave the guide out"
        )
    if batch.images is None or not len(batch.images):
        device = batch.labels.device
        return torch.zeros(len(batch), int(guide.embed_width), device=device)
    images = _sized(batch.images, guide.size)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return one_a_row(guide.embed(Batch(images, labels, labels), "image"), batch)


def one_a_row(pictures: Tensor, batch: Batch) -> Tensor:
    """Return (B, E) unit vectors of rows, of (M, E) vectors of their pictures.

    A row without a picture has the zero vector, a row with several the mean of theirs.
    """
    if batch.owner is not None:
        rows = pictures.new_zeros(len(batch), pictures.shape[1])
        pictures = rows.index_add(0, batch.owner, pictures)
    return functional.normalize(pictures, dim=-1)


def _questions(guide: Any, batch: Batch) -> Tensor:
    if len(batch.references) != len(batch):
        raise ValueError(
            f"{len(batch.references)} questions for {len(batch)} rows: a guide embeds the text of "
            "questions, which stand in batch.references"
        )
    transform = guide.transform(False)
    rows = [transform(None, reference.question, 0).tokens for reference in batch.references]
    tokens = pad_sequence(rows, batch_first=True).to(batch.labels.device)
    asked = replace(
        batch, images=None, owner=None, features=None, tokens=tokens, mask=tokens != 0,
        labels=batch.task,
    )  # fmt: skip
    embedded: Tensor = guide.embed(asked, "text")
    return embedded


def _sized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    # GPUs resize no bytes.
    made = functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return made.round_().clamp_(0, 255).to(torch.uint8)
