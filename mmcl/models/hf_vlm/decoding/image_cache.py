"""Projected images, kept for further questions of the same image.

An image goes through tower and projector once, also if its questions are in consecutive batches. A
file of its own because it decides when kept features are stale.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcl.core import Batch, Prompts
from mmcl.models.hf_vlm.architectures import Architecture
from mmcl.models.hf_vlm.image_inputs import ImageInputs

MAX_CACHE_BYTES = 2**28
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ENCODED_NAMES = {"pixel_values", "vision_feature_layer"}


class EncodingModel(Protocol):
    """Members of ``ImageTextToText`` that encoding uses."""

    lm: Any
    image_inputs: ImageInputs


class ImageCache:
    """Projected images by their content, at most ``max_bytes`` of them, those used last.

    They are dropped when a weight of tower or projector has changed, whichever way: the sum of all
    weights' bits is compared, because fused optimizers and ``.data`` raise no version. Where
    adapters are on the way of an image, they are kept within a batch only.

    Args:
        lm: model of transformers, without adapters.
        architecture: architecture of its type.
        max_bytes: of the features that are kept on their device; 0 keeps none between batches.
    """

    def __init__(
        self, lm: Any, architecture: Architecture, max_bytes: int = MAX_CACHE_BYTES
    ) -> None:
        self.max_bytes = max_bytes
        self._names = frozenset(_weights(lm, architecture))
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        self._state: object = None
        self._bytes = 0

    def clear(self) -> None:
        """Drop all features."""
        self._features.clear()
        self._state, self._bytes = None, 0

    def encode(
        self, model: EncodingModel, image_inputs: dict[str, Any], batch: Batch, prompts: Prompts
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Encode the images of a batch, each different one at most once.

        Args:
            model: an ``ImageTextToText`` in evaluation mode.
            image_inputs: see ``ImageInputs.forward_kwargs``.
            batch: whose images they are.
            prompts: of the samples.

        Returns:
            arguments of the forward pass with projected images, and the sha256 of each image. They
            are the ones given, and none, where the model takes no projected images, more than
            pixels decides them, gates of a sample apply to its images, or weights are sharded.
        """
        pixels = image_inputs.get("pixel_values")
        if pixels is None or pixels.ndim != 4 or not image_inputs.keys() <= _ENCODED_NAMES:
            return image_inputs, []
        weights = _weights(model.lm, model.image_inputs.architecture)
        has_adapters = weights.keys() != self._names
        if not model.image_inputs.takes_features or (has_adapters and prompts.gates):
            return image_inputs, []
        if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in weights.values()):
            return image_inputs, []  # sharded or offloaded: only the model's own forward pass works
        keys = _digests(pixels if batch.image_inputs else batch.images, pixels)
        self._expect_state(None if has_adapters else _state(weights.values(), pixels))
        known = {key: self._features[key] for key in keys if key in self._features}
        rows = {key: row for row, key in enumerate(keys) if key not in known}
        if rows:
            kept = pixels[torch.tensor(list(rows.values()), device=pixels.device)]
            with model.image_inputs.used_layers.only(model.lm):
                found = model.lm.model.get_image_features(**{**image_inputs, "pixel_values": kept})
            known.update(zip(rows, found.pooler_output, strict=True))
        if self._state is not None:
            self._keep(known)
        each = [known[key] for key in keys]
        # A list where the model joins lists.
        joined = torch.stack(each) if model.image_inputs.architecture.is_stacked else each
        return with_projected(joined), keys

    def _expect_state(self, state: object) -> None:
        if state != self._state:
            self.clear()
            self._state = state

    def _keep(self, features: dict[bytes, Tensor]) -> None:
        for key, feature in features.items():
            if key not in self._features:
                self._features[key] = feature.clone()  # a row alone, not the batch that it is of
                self._bytes += feature.nbytes
            self._features.move_to_end(key)
        while self._bytes > self.max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].nbytes


def with_projected(images: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """Return the arguments of the forward pass with M projected images (N, D)."""
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=images)}}


def projected_images(image_inputs: dict[str, Any]) -> Tensor | Sequence[Tensor]:
    """Return the projected images of ``with_projected``, () = there are none."""
    found = image_inputs.get("mm_encoder_outputs")
    images: Tensor | Sequence[Tensor] = () if found is None else found["image"].pooler_output
    return images


def _digests(images: Tensor | None, pixels: Tensor) -> list[bytes]:
    """Return the sha256 of each image: of its levels, which are smaller, or of its pixels."""
    content = pixels if images is None or len(images) != len(pixels) else images
    rows = content.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.sha256(row.data).digest() for row in rows]


def _weights(lm: Any, architecture: Architecture) -> dict[str, Tensor]:
    """Return the parameters and buffers of tower and projector by their names."""
    found = {}
    for place in (architecture.tower, architecture.projector):
        module = lm.model.get_submodule(place)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            found[f"{place}.{name}"] = tensor
    return found


def _state(weights: Iterable[Tensor], pixels: Tensor) -> object:
    """Return what decides features: kind of arithmetic, and weights and buffers by their bits."""
    kinds, sums, device = [], [], pixels.device
    for tensor in weights:
        words = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
        kinds.append((id(tensor), tuple(tensor.shape), tensor.dtype))
        sums.append(words.sum(dtype=torch.int64).to(device))
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    shape = tuple(pixels.shape[1:])
    return (device, pixels.dtype, shape, autocast, kinds, torch.stack(sums).tolist())
