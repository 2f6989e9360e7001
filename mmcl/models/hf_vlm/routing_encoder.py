"""Routing encoder: embeddings of a second, frozen CLIP by which samples are routed and compared.

A file of its own because it needs no model of transformers: any dual encoder serves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from mmcl.core import Batch, Modality


def embed_with_encoder(routing_encoder: Any, batch: Batch, modality: Modality) -> Tensor:
    """Return (B, E) unit embeddings of images or questions by the routing encoder.

    The encoder is a dual one such as ``OpenCLIP``; images are squares of any size, and "text" is
    the last question of each sample, from its reference.

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
    texts = [transform(None, reference.question, 0).input_ids for reference in batch.references]
    lengths = torch.tensor([len(text) for text in texts])
    tokens = pad_sequence(texts, batch_first=True)
    mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    tokens, mask = tokens.to(batch.labels.device), mask.to(batch.labels.device)
    questions = replace(
        batch, images=None, image_owner=None, image_inputs=(), features=None,
        input_ids=tokens, attention_mask=mask, labels=batch.task_ids,
    )  # fmt: skip
    embedded: Tensor = routing_encoder.embed(questions, "text")
    return embedded


def _resized(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    sides = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == sides:
        return images
    # torch resizes uint8 on the CPU only.
    resized = functional.interpolate(images.float(), sides, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
