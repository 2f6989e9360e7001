"""Layers of a vision tower that the model reads: the last ones that nobody reads are not computed.

LLaVA selects the hidden state of the last layer but one, and SigLIP's pooling head is not read by
any family. transformers computes both. A file of its own because it changes a tower for a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.model import eval_mode
from mmcl.models.hf_vlm.architectures import Architecture

_ARGUMENT = "vision_feature_layer"


class UsedLayers:
    """Layers of a vision tower up to the hidden states that the model selects; exact.

    The first images of a model prove it: their features with all layers and with these ones are the
    same bits, or all layers run.

    Args:
        lm: model of transformers.
        architecture: architecture of its type.
    """

    def __init__(self, lm: Any, architecture: Architecture) -> None:
        self._tower = architecture.tower
        function = getattr(lm.model, "get_image_features", None)
        names = inspect.signature(function).parameters if function is not None else {}
        takes = _ARGUMENT in names and _ARGUMENT in inspect.signature(lm.model.forward).parameters
        self._names = frozenset(names)
        self._selected = _selected(lm, self._depth(lm)) if takes else None
        self._is_proven: bool | None = None

    def arguments(self, lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the argument that selects hidden states counted from the first layer, if needed.

        Args:
            lm: model of transformers.
            inputs: arguments of its forward pass, with ``pixel_values``.
        """
        if self._is_proven is None:
            self._is_proven = self._is_exact(lm, inputs)
        if not self._is_proven or self._selected is None:
            return {}
        return {_ARGUMENT: self._selected}

    @contextmanager
    def only(self, lm: Any) -> Iterator[None]:
        """Leave the tower the layers that are read inside the block.

        Inside, images go through the tower with ``arguments`` only.
        """
        if not self._is_proven:
            yield
            return
        with self._cut(lm):
            yield

    @contextmanager
    def _cut(self, lm: Any) -> Iterator[None]:
        tower = lm.model.get_submodule(self._tower)
        heads = [m for m in tower.modules() if getattr(m, "use_head", False) is True]
        heads = [m for m in heads if not _is_observed(getattr(m, "head", m))]
        place = self._place(lm)
        layers = None if place is None else getattr(*place)
        used = None if layers is None else self._used(layers)
        try:
            for module in heads:
                module.use_head = False
            if place is not None and used is not None:
                setattr(*place, used)
            yield
        finally:
            for module in heads:
                module.use_head = True
            if place is not None:
                setattr(*place, layers)

    def _used(self, layers: nn.ModuleList) -> nn.ModuleList:
        """Return the layers that are read; all of them if something looks at another one."""
        if self._selected is None:
            return layers
        chosen = self._selected if isinstance(self._selected, list) else [self._selected]
        count = max(chosen)
        return layers if any(_is_observed(layer) for layer in layers[count:]) else layers[:count]

    def _place(self, lm: Any) -> tuple[nn.Module, str] | None:
        """Return the module that holds the tower's layers, and their name in it."""
        tower = lm.model.get_submodule(self._tower)
        depth = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
        found = [
            (parent, name)
            for parent in tower.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) == depth
        ]
        return found[0] if len(found) == 1 else None

    def _depth(self, lm: Any) -> int | None:
        place = self._place(lm)
        return None if place is None else len(getattr(*place))

    @torch.no_grad()
    def _is_exact(self, lm: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether the features of these images are the same bits; False if nothing is left out."""
        tower = lm.model.get_submodule(self._tower)
        has_head = any(getattr(module, "use_head", False) is True for module in tower.modules())
        if not has_head and self._selected is None:
            return False
        given = {name: value for name, value in inputs.items() if name in self._names}
        more = {} if self._selected is None else {_ARGUMENT: self._selected}
        with eval_mode(lm.model):
            try:
                whole = _projected(lm, given)
                with self._cut(lm):
                    found = _projected(lm, {**given, **more})
            # A family that reads more of its tower fails in a way of its own.
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
                return False
        pairs = zip(whole, found, strict=False)
        return len(whole) == len(found) and all(torch.equal(a, b) for a, b in pairs)


def _selected(lm: Any, depth: int | None) -> int | list[int] | None:
    """Return the selected hidden states, 0 the input of the first layer; None = all layers run."""
    layers = getattr(lm.config, _ARGUMENT, None)
    chosen = [layers] if isinstance(layers, int) else layers
    if depth is None or not isinstance(chosen, Sequence) or not len(chosen):
        return None
    counted = [int(layer) if layer >= 0 else depth + 1 + int(layer) for layer in chosen]
    if not 0 < max(counted) < depth or min(counted) < 0:
        return None
    return counted[0] if isinstance(layers, int) else counted


def _projected(lm: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    found = lm.model.get_image_features(**inputs).pooler_output
    return [found] if isinstance(found, Tensor) else list(found)


def _is_observed(module: nn.Module) -> bool:
    """Whether hooks look at its activations, other than those by which transformers collects."""
    return any(
        not getattr(hook, "__module__", "").startswith("transformers.")
        for part in module.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
