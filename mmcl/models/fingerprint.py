"""Fingerprint (sha256) of frozen weights, which stored features and checkpoints are bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mmcl.core.model import frozen_modules, without_adapters


def fingerprint_of(settings: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of settings and of named tensors, their types and shapes.

    Args:
        settings: description of the preprocessing.
        tensors: names and tensors, always in the same order.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_base_parameters(model: nn.Module, own: frozenset[str]) -> dict[str, Tensor]:
    """Return the frozen parameters of the base model by their names without adapters.

    Parameters that a strategy added or trains do not count: they are in the checkpoint and change
    from task to task.

    Args:
        model: with or without adapters.
        own: names of the model's parameters before adapters were injected.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        plain = without_adapters(name)
        if plain in own and not parameter.requires_grad:
            found[plain] = parameter
    return dict(sorted(found.items()))


def frozen_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of frozen modules by their names without adapters.

    Running statistics of a BatchNorm change features as weights do. Buffers that are not persistent
    are computed from the configuration.
    """
    frozen = {id(part) for module in frozen_modules(model) for part in module.modules()}
    found = {
        without_adapters(f"{prefix}.{name}" if prefix else name): buffer
        for prefix, module in model.named_modules()
        if id(module) in frozen
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return dict(sorted(found.items()))


class Fingerprint:
    """Cached fingerprint: hashes tensors again only if one was replaced or written to."""

    def __init__(self) -> None:
        self._cache: tuple[object, str] = ((), "")

    def of(self, settings: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
        """Return ``fingerprint_of`` settings and tensors."""
        named = dict(tensors)
        key = (settings, [(name, t.data_ptr(), t._version) for name, t in named.items()])
        if self._cache[0] != key:
            self._cache = (key, fingerprint_of(settings, named.items()))
        return self._cache[1]
