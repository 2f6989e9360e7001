"""The mark of weights that do not change: remembered rows and checkpoints name it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def fingerprint_of(settings: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of settings and of named tensors, their types and shapes.

    Args:
        settings: of the preprocessing, in words.
        tensors: in an order that is always the same.
    """
    digest = hashlib.sha256(settings.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_WRAPPED = (".base_layer.", ".base.")


def frozen_own(model: nn.Module, own: frozenset[str]) -> dict[str, Tensor]:
    """Return the frozen parameters that a model was made with, by the names they had then.

    Layers that a strategy installed around them, and what it froze of its own, do not count: those
    are in the checkpoint, and change from task to task.

    Args:
        model: with or without adapters.
        own: names of its parameters when it was made.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for wrap in _WRAPPED:
            name = name.replace(wrap, ".")
        if name in own and not parameter.requires_grad:
            found[name] = parameter
    return dict(sorted(found.items()))


class Fingerprint:
    """Hashes tensors once for as long as they stay what and where they are."""

    def __init__(self) -> None:
        self._seen: tuple[object, str] = ((), "")

    def of(self, settings: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
        """Return ``fingerprint_of`` the same, remembered where nothing has changed."""
        named = dict(tensors)
        key = (settings, [(name, t.data_ptr(), t._version) for name, t in named.items()])
        if self._seen[0] != key:
            self._seen = (key, fingerprint_of(settings, named.items()))
        return self._seen[1]
