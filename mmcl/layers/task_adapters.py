"""TaskAdapters: the LoRA adapters of a strategy in a frozen language model, task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, cast

from torch import nn

from mmcl.core import VLM, require, trainable_parameters
from mmcl.core.seeding import generator
from mmcl.layers.inject import Layer, find_layers, inject, merged_adapters
from mmcl.layers.multi_lora import Mode, MultiLoRALinear

TargetModules = Literal["all", "attention", "mlp"]


class TaskAdapters:
    """Options that the LoRA strategies share, and the adapters built from them.

    A strategy owns one; it has no state of its own, the adapters are the model's.

    Args:
        rank: r of an adapter's A (r, d_in) and B (d_out, r), 1 or more.
        alpha: the scale of adapters is alpha / rank; None = 2 * rank.
        dropout: of the adapters' input in training, 0 to below 1.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: leave the projector between the towers trainable.
        seed: seed of the initial A; an adapter's start depends on seed, adapter and layer alone.

    Raises:
        ValueError: if rank or dropout is out of range.
    """

    def __init__(
        self,
        rank: int,
        alpha: float | None,
        dropout: float,
        target_modules: TargetModules,
        train_projector: bool,
        seed: int,
    ) -> None:
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"rank is {rank} and dropout {dropout}: give a rank of 1 or more and a dropout "
                "from 0 to below 1"
            )
        self.rank, self.alpha = rank, 2 * rank if alpha is None else alpha
        self.scale, self.dropout = self.alpha / rank, dropout
        self.target_modules: TargetModules = target_modules
        self.train_projector, self.seed = train_projector, seed

    def freeze(self, model: VLM, by: object) -> dict[str, nn.Linear]:
        """Freeze a model and return its target layers, see ``freeze_and_target``."""
        return freeze_and_target(model, self.target_modules, self.train_projector, by)

    def inject(
        self, model: VLM, make: Callable[[nn.Linear, int], Layer], by: object
    ) -> dict[str, Layer]:
        """Freeze a model and replace its target layers.

        Args:
            model: changed in place.
            make: called with each target layer and its index, in the model's order.
            by: the strategy, for errors.

        Returns:
            full name -> new layer, in the model's order.
        """
        layers = self.freeze(model, by)
        index = iter(range(len(layers)))
        return inject(cast(nn.Module, model), layers, lambda linear: make(linear, next(index)))

    def attach(
        self, model: VLM, by: object, *, gates: str = "", adapters: int = 1
    ) -> dict[str, MultiLoRALinear]:
        """Freeze a model and give each target layer trainable adapters, none of them active.

        Args:
            model: changed in place.
            by: the strategy, for errors.
            gates: name of a layer's entry in ``model.gates``, "{index}" in it is the layer's
                index; "" = adapters are not gated.
            adapters: number per layer.

        Returns:
            full name -> layer, in the model's order.
        """
        entries = require(model, "gates", by=by).gates if gates else None

        def make(linear: nn.Linear, index: int) -> MultiLoRALinear:
            name = gates.format(index=index)
            return MultiLoRALinear(linear, self.scale, self.dropout, entries, name)

        self.inject(model, make, by)
        return self._grow(model, adapters, first_trainable=0)

    def begin_task(self, model: VLM, task: int) -> dict[str, MultiLoRALinear]:
        """Add the adapters of a task where they are missing, and make only them trainable.

        Args:
            model: attached to.
            task: index of the task.

        Returns:
            full name -> layer, in the model's order.
        """
        return self._grow(model, task + 1, first_trainable=task)

    def layers_of(self, model: VLM) -> dict[str, MultiLoRALinear]:
        """Return the layers with adapters by full name, in the model's order."""
        return find_layers(cast(nn.Module, model), MultiLoRALinear)

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the active adapters into the weights inside the block."""
        return merged_adapters(cast(nn.Module, model))

    def _grow(self, model: VLM, count: int, first_trainable: int) -> dict[str, MultiLoRALinear]:
        layers = self.layers_of(model)
        for index, layer in enumerate(layers.values()):
            while len(layer.adapters) < count:
                layer.add_adapter(self.rank, generator(self.seed, len(layer.adapters), index))
            layer.freeze_adapters(first_trainable)
            for old in range(first_trainable):
                layer.adapter(old).zero_grad()  # frees the gradients of the last task
        return layers


def freeze_and_target(
    model: VLM, target_modules: TargetModules, train_projector: bool, by: object
) -> dict[str, nn.Linear]:
    """Freeze a model and return the target linear layers of its language model.

    Args:
        model: with ``target_linears`` and ``freeze``.
        target_modules: "all", or those of "attention" or "mlp".
        train_projector: leave the projector between the towers as it is.
        by: the strategy, for errors.

    Returns:
        full name -> layer, in the model's order.

    Raises:
        TypeError: if the model lacks a member.
        ValueError: if there is no such layer.
    """
    able = require(model, "target_linears", "freeze", by=by)
    _freeze(able, train_projector)
    found: dict[str, nn.Linear] = able.target_linears(target_modules)
    if not found:
        raise ValueError(
            f"model.target_linears('{target_modules}') is empty: choose other target_modules, or "
            "check the model"
        )
    return found


def set_active_adapters(
    layers: Iterable[MultiLoRALinear], mode: Mode, adapters: Iterable[int]
) -> None:
    """Activate adapters in layers where others are active now.

    A strategy may call it before every forward pass, also inside ``merged_adapters`` for the
    adapters that are merged.

    Args:
        layers: to change.
        mode: of ``MultiLoRALinear.set_adapters``.
        adapters: numbers of the adapters, in the order of the gates.
    """
    chosen = tuple(adapters)
    for layer in layers:
        if (layer.mode, layer.active) != (mode, chosen):
            layer.set_adapters(mode, chosen)


def _freeze(model: Any, train_projector: bool) -> None:
    """Freeze all parameters, also those of no tower; the projector's as ``train_projector`` has it.

    A projector parameter that was frozen before stays frozen.
    """
    model.freeze("image", "text")
    before = trainable_parameters(model)
    model.freeze("projector")
    projector = [p for p in before.values() if not p.requires_grad]
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(False)
    for parameter in projector:
        parameter.requires_grad_(train_projector)
