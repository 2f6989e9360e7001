"""Put layers in the place of a model's linear ones, and find them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from mmcl.layers.low_rank import LowRankSlots

Layer = TypeVar("Layer", bound=nn.Module)


def install(
    model: nn.Module, names: Iterable[str], make: Callable[[nn.Linear], Layer]
) -> dict[str, Layer]:
    """Replace linear layers of a model by what ``make`` builds around each; they are frozen.

    Args:
        model: changed in place.
        names: full module names, as ``model.linears()`` gives them.
        make: called with each linear layer, in the order of the names.

    Returns:
        name -> new layer.

    Raises:
        ValueError: if a name is unknown, or is that of no linear layer; nothing is replaced then.
        RuntimeError: if a layer is installed there already.
    """
    known = dict(model.named_modules())
    found = {name: _linear_at(known, name) for name in names}
    made: dict[str, Layer] = {}
    for name, linear in found.items():
        made[name] = make(linear.requires_grad_(False))
        parent, _, last = name.rpartition(".")
        setattr(known[parent], last, made[name].train(linear.training))
    return made


def installed(model: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """Return the installed layers of a kind by full name, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Merge slots into weights inside the block, where one weight can do it, and back after.

    Layers with gates stay as they are; weights are the same bits after the block as before.

    Args:
        model: with ``LowRankSlots`` installed.
    """
    layers = [layer for layer in installed(model, LowRankSlots).values() if layer.can_fold]
    try:
        for layer in layers:
            layer.fold()
        yield
    finally:
        for layer in layers:
            layer.unfold()


def _linear_at(known: Mapping[str, nn.Module], name: str) -> nn.Linear:
    places = name.split(".")
    for end in range(1, len(places) + 1):
        place = ".".join(places[:end])
        above = known.get(place)
        if above is not None and not isinstance(above, nn.Linear) and _has_base(above):
            raise RuntimeError(
                f"'{place}' already holds {type(above).__name__}: install one kind "
                "of layer in a place; of two strategies that adapt layers keep one"
            )
    if name not in known:
        raise ValueError(
            f"the model has no layer '{name}': take the names from model.linears(), for example "
            f"{', '.join(_linears(known)[:2]) or 'none here'}"
        )
    layer = known[name]
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"'{name}' is {type(layer).__name__}, expected a linear layer: take the names from "
            "model.linears()"
        )
    return layer


def _has_base(layer: nn.Module) -> bool:
    """Ours keep what they replaced as ``base``, peft's as ``base_layer``."""
    return any(isinstance(getattr(layer, name, None), nn.Linear) for name in ("base", "base_layer"))


def _linears(known: Mapping[str, nn.Module]) -> list[str]:
    return [name for name, layer in known.items() if isinstance(layer, nn.Linear)]
