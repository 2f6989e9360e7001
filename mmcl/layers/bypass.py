"""A model without its adapters, for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

_BASES = ("base", "base_layer")
"""Where an adapted layer keeps what it replaced: ours and peft's."""


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layer that stands under each adapter, by the adapter's full name."""
    return {
        name: base
        for name, layer in model.named_modules()
        for base in (getattr(layer, own, None) for own in _BASES)
        if isinstance(base, nn.Module) and hasattr(base, "weight")
    }


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Let every adapted layer answer as the layer it adapts; no weight is touched or copied.

    Args:
        model: with layers of ``mmcl.layers`` or of peft in it, or without.
    """
    layers = dict(model.named_modules())
    hidden: list[tuple[nn.Module, Any]] = []
    try:
        for name, base in adapted(model).items():
            layer = layers[name]
            hidden.append((layer, vars(layer).get("forward")))
            cast(Any, layer).forward = _forward_of(base)
        yield
    finally:
        for layer, own in hidden:
            if own is None:
                del layer.forward
            else:
                cast(Any, layer).forward = own


def _forward_of(base: nn.Module) -> Any:
    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        return base(x)

    return forward
