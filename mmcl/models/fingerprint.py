"""The mark of weights that do not change: remembered rows and checkpoints name it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


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
        digest.update(plain.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
