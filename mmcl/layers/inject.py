"""Inject adapter layers into a model: replace linear layers, find, merge and disable them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from mmcl.layers.multi_lora import MultiLoRALinear

Layer = TypeVar("Layer", bound=nn.Module)

_BASES = ("base", "base_layer")
"""Attribute in which an adapter layer stores the layer it replaced: ours, and peft's."""


def inject(
    model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear], Layer]
) -> dict[str, Layer]:
    """Replace linear layers of a model by adapter layers built around each; bases are frozen.

    Args:
        model: changed in place.
        names: full module names, as ``model.target_linears()`` gives them.
        make: called with each linear layer, in the order of the names.

    Returns:
        name -> new layer.

    Raises:
        ValueError: if a name is unknown, or is that of no linear layer; nothing is replaced then.
        RuntimeError: if an adapter layer was injected there already.
    """
    known = dict(model.named_modules())
    found = {name: _linear_at(known, name) for name in names}
    made: dict[str, Layer] = {}
    for name, linear in found.items():
        made[name] = make(linear.requires_grad_(False))
        parent, _, last = name.rpartition(".")
        setattr(known[parent], last, made[name].train(linear.training))
    return made


def find_layers(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the adapter layers of a kind by full name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Merge adapters into the weights inside the block where one weight can, and unmerge after.

    Layers with gates stay as they are; after the block the weights are the same bits as before.

    Args:
        model: with ``MultiLoRALinear`` injected.
    """
    layers = [layer for layer in find_layers(model, MultiLoRALinear).values() if layer.can_merge]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base layer under each adapter layer, by the adapter layer's full name."""
    return {
        name: base
        for name, layer in model.named_modules()
        for base in (getattr(layer, own, None) for own in _BASES)
        if isinstance(base, nn.Module) and hasattr(base, "weight")
    }


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the block: each adapter layer returns its base layer's output.

    No weight is changed or copied.

    Args:
        model: with adapter layers of ``mmcl.layers`` or peft, or without any.
    """
    layers = dict(model.named_modules())
    hidden: list[tuple[nn.Module, Any]] = []
    try:
        for name, base in base_layers(model).items():
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


def _linear_at(known: Mapping[str, nn.Module], name: str) -> nn.Linear:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        prefix = ".".join(parts[:end])
        above = known.get(prefix)
        if above is not None and not isinstance(above, nn.Linear) and _has_base(above):
            raise RuntimeError(
                f"'{prefix}' already is {type(above).__name__}: inject adapters into a layer once; "
                "of two strategies that adapt the same layers keep one"
            )
    if name not in known:
        raise ValueError(
            f"the model has no layer '{name}': take the names from model.target_linears(), for "
            "example "
            f"{', '.join(_linears(known)[:2]) or 'none here'}"
        )
    layer = known[name]
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"'{name}' is {type(layer).__name__}, expected a linear layer: take the names from "
            "model.target_linears()"
        )
    return layer


def _has_base(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), nn.Linear) for name in _BASES)


def _linears(known: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, layer in known.items() if isinstance(layer, nn.Linear)]


def _forward_of(base: nn.Module) -> Any:
    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        return base(x)

    return forward
