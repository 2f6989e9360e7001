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

from mmcl.core.model import trial_pass
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
        self._tower, self._projector = architecture.tower, architecture.projector
        self._heads: list[nn.Module] | None = None
        self._place = self._find_place(lm)
        function = getattr(lm.model, "get_image_features", None)
        names = inspect.signature(function).parameters if function is not None else {}
        takes = _ARGUMENT in names and _ARGUMENT in inspect.signature(lm.model.forward).parameters
        self._names = frozenset(names)
        depth = None if self._place is None else len(getattr(*self._place))
        self._selected = _selected(lm, depth) if takes else None
        self._is_proven: bool | None = None

    def arguments(self, lm: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the argument that selects hidden states counted from the first layer, if needed.

        Args:
            lm: model of transformers.
            inputs: arguments of its forward pass, with ``pixel_values``.
        """
        if self._is_proven is None:
            # A hook that collects statistics would see the images of the proof as well.
            parts = (lm.model.get_submodule(name) for name in (self._tower, self._projector))
            if any(_is_observed(part) for part in parts):
                return {}
            self._heads = self._find_heads(lm)
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
        with self._cut():
            yield

    @contextmanager
    def _cut(self) -> Iterator[None]:
        heads: list[Any] = [
            m for m in self._heads or () if not _is_observed(m.get_submodule("head"))
        ]
        place = None if self._selected is None else self._place
        layers: Any = None if place is None else getattr(*place)
        try:
            for module in heads:
                module.use_head = False
            if place is not None:
                setattr(*place, self._used(layers))
            yield
        finally:
            for module in heads:
                module.use_head = True
            if place is not None:
                setattr(*place, layers)

    def _used(self, layers: nn.ModuleList) -> nn.ModuleList:
        """Return the layers that are read; all of them if something looks at another one."""
        selected = self._selected
        count = selected if isinstance(selected, int) else max(selected or [len(layers)])
        return layers if any(_is_observed(layer) for layer in layers[count:]) else layers[:count]

    def _find_heads(self, lm: Any) -> list[nn.Module]:
        tower = lm.model.get_submodule(self._tower)
        return [m for m in tower.modules() if getattr(m, "use_head", False) is True and m.head]

    def _find_place(self, lm: Any) -> tuple[nn.Module, str] | None:
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

    @torch.no_grad()
    def _is_exact(self, lm: Any, inputs: Mapping[str, Any]) -> bool:
        """Whether the features of these images are the same bits; False if nothing is left out."""
        if not self._heads and self._selected is None:
            return False
        given = {name: value for name, value in inputs.items() if name in self._names}
        more = {} if self._selected is None else {_ARGUMENT: self._selected}
        with trial_pass(lm.model):
            try:
                whole = _projected(lm, given)
                with self._cut():
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
