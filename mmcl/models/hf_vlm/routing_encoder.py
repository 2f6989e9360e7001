"""Embeddings by a frozen CLIP, the routing encoder of a generative model.

A file of its own: it is the only place where a second, frozen encoder is run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Batch, Modality


@torch.no_grad()
def embed_with_encoder(routing_encoder: Any, batch: Batch, modality: Modality) -> Tensor:
    """Return (B, E) unit embeddings of images or questions by the routing encoder.

    Args:
        routing_encoder: a dual encoder such as ``OpenCLIP``.
        batch: with square images of any size, and references that hold the questions.
        modality: "image", or "text" for the last question of each sample.

    Raises:
        ValueError: if samples have stored features instead of images, or no references.
    """
    if modality == "text":
        return _embed_questions(routing_encoder, batch)
    if batch.features is not None:
        raise ValueError(
            "routing_encoder needs images and these samples have stored features instead: route "
            "without FeatureReplay, or leave routing_encoder out"
        )
    if batch.images is None or not len(batch.images):
        device = batch.labels.device
        return torch.zeros(len(batch), int(routing_encoder.embed_dim), device=device)
    images = _resized(batch.images, routing_encoder.size)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return pool_images(routing_encoder.embed(Batch(images, labels, labels), "image"), batch)


def pool_images(images: Tensor, batch: Batch) -> Tensor:
    """Pool the embeddings (M, E) of images to unit embeddings (B, E) of their samples.

    A sample without images has the zero vector, one with several the mean of theirs.
    """
    if batch.image_owner is not None:
        sums = images.new_zeros(len(batch), images.shape[1])
        images = sums.index_add(0, batch.image_owner, images)
    return functional.normalize(images, dim=-1)


def _embed_questions(routing_encoder: Any, batch: Batch) -> Tensor:
    if len(batch.references) != len(batch):
        raise ValueError(
            f"the batch has {len(batch.references)} references for {len(batch)} samples: a routing "
            "encoder embeds the questions in batch.references, so give one per sample"
        )
    transform = routing_encoder.transform(False)
    texts = [transform(None, reference.question, 0).tokens for reference in batch.references]
    tokens = pad_sequence(texts, batch_first=True).to(batch.labels.device)
    questions = replace(
        batch, images=None, image_owner=None, features=None, input_ids=tokens,
        attention_mask=tokens != 0, labels=batch.task_ids,
    )  # fmt: skip
    embedded: Tensor = routing_encoder.embed(questions, "text")
    return embedded


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    # torch resizes uint8 on the CPU only.
    resized = functional.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
