"""Adapters in a model: inject, find, merge and disable them; those of a strategy, task by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

from torch import nn

from mmcl.core import VLM, require, trainable_parameters
from mmcl.core.model import BASE_LAYER_NAMES
from mmcl.core.seeding import generator
from mmcl.layers.lora_layers import Mode, MultiLoRALinear
from mmcl.layers.target_layers import TargetModules, freeze_and_target

Layer = TypeVar("Layer", bound=nn.Module)


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
    """
    layers = [layer for layer in find_layers(model, MultiLoRALinear).values() if layer.can_merge]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()


@contextmanager
def keep_active_adapters(model: nn.Module) -> Iterator[None]:
    """Context after which the same adapters are active as before, whatever was active inside."""
    layers = find_layers(model, MultiLoRALinear).values()
    before = [(layer, layer.mode, layer.active) for layer in layers]
    try:
        yield
    finally:
        for layer, mode, active in before:
            set_active_adapters([layer], mode, active)


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapter layers, of ``mmcl.layers`` or peft, by full name."""
    layers = dict(model.named_modules())
    return {name: layers[name] for name in base_layers(model)}


def expect_lasting_weights(model: VLM, by: object) -> None:
    """Check that trainable weights are the same numbers from task to task.

    Raises:
        ValueError: if some are the factors of OSF, which decomposes its layers again in every task.
    """
    for name in trainable_parameters(model):
        if _OSF_FACTORS in name:
            raise ValueError(
                f"{type(by).__name__} compares weights of different tasks, and OSF gives '{name}' "
                "another shape and meaning in every task: use one of the two, or "
                f"{type(by).__name__} with Finetune or LoRA"
            )


_OSF_FACTORS = ".osf_svd_params."


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the base layer under each adapter layer, by the adapter layer's full name."""
    return {
        name: base
        for name, layer in model.named_modules()
        for base in (getattr(layer, own, None) for own in BASE_LAYER_NAMES)
        if isinstance(base, nn.Module) and hasattr(base, "weight")
    }


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the block: each adapter layer returns its base layer's output.

    No weight is changed or copied; the layers may be of ``mmcl.layers`` or peft.
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
        bases = [getattr(above, attribute, None) for attribute in BASE_LAYER_NAMES]
        if not isinstance(above, nn.Linear) and any(isinstance(b, nn.Linear) for b in bases):
            raise RuntimeError(
                f"'{prefix}' already is {type(above).__name__}: inject adapters into a layer once; "
                "of two strategies that adapt the same layers keep one"
            )
    if name not in known:
        linears = [other for other, layer in known.items() if isinstance(layer, nn.Linear)]
        raise ValueError(
            f"the model has no layer '{name}': take the names from model.target_linears(), for "
            f"example {', '.join(linears[:2]) or 'none here'}"
        )
    layer = known[name]
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"'{name}' is {type(layer).__name__}, expected a linear layer: take the names from "
            "model.target_linears()"
        )
    return layer


def _forward_of(base: nn.Module) -> Any:
    def forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        return base(x)

    return forward


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
        """Freeze a model and replace its target layers in place.

        ``make`` is called with each target layer and its index; ``by`` is the strategy, for errors.

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


def set_active_adapters(
    layers: Iterable[MultiLoRALinear], mode: Mode, adapters: Iterable[int]
) -> None:
    """Activate adapters, in the order of the gates, in layers where others are active now.

    A strategy may call it before every forward pass, also inside ``merged_adapters`` for the
    adapters that are merged.
    """
    chosen = tuple(adapters)
    for layer in layers:
        if (layer.mode, layer.active) != (mode, chosen):
            layer.set_adapters(mode, chosen)
