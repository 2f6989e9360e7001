"""LoRA trains one low-rank adapter of a frozen model on all tasks; the baseline of LoRA methods.

Paper: Hu et al. 2021, arXiv:2106.09685. As sequential fine-tuning in Guo et al. 2025,
arXiv:2508.07307.
Code followed: none; the layers are peft's, with a fused forward for their plain case.
Differs: no dropout by default; adapters of a half-precision model are float32 and their products
are in the model's precision, where peft widens the activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Strategy, require
from mmcl.core.master_weights import rounded_state
from mmcl.core.seeding import hash_seed
from mmcl.layers.adapters import TaskAdapters
from mmcl.layers.target_layers import (
    TargetModules,
    freeze_except,
    match_modules,
    modules_in_full,
    root_of,
    select_linears,
    tied_names,
    untie_head,
)

if TYPE_CHECKING:
    from mmcl.layers.peft_adapter import StoredAdapter

AdapterMode = Literal["continue", "merge"]
_ADAPTER = "default"
_OURS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "modules_to_save",
    "trainable_token_indices",
)  # fmt: skip
_OBEYED = (
    "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "lora_bias",
    "exclude_modules", "layers_to_transform", "layers_pattern", "task_type",
    "ensure_weight_tying",
)  # fmt: skip
"""Arguments of ``peft.LoraConfig`` that are obeyed here; others would be lost without a word."""
_FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
_HARMLESS_STARTS = ("gaussian", "orthogonal")


class LoRA(Strategy):
    """Low-rank adaptation: one peft LoRA adapter, trained on one task after another.

    ``W x + alpha / rank * B A x`` in the model's target layers (a generative model's are in its
    language model); everything else is frozen. In a chain it comes first, so that the others (EWC,
    LwF) see the trainable parameters. What trains beside the adapter may have a learning rate of
    its own: ``model.param_groups: {projector: 2.0e-5}``.

    Args:
        rank: r of A (r, d_in) and B (d_out, r); None = 16, or that of ``adapter``.
        alpha: the scale of the adapter is alpha / rank; None = 2 * rank, or that of ``adapter``.
        dropout: of the adapter's input in training, 0 to below 1; 0 is faster; None = 0, or that of
            ``adapter``.
        target_modules: "all" linear layers, or those of "attention" or "mlp"; "all-linear" = also
            those of vision tower and projector, as in peft; a regular expression that matches whole
            names; or a list of names and ends of names. None = "all", or those of ``adapter``.
        train_projector: train the projector between the towers as well, in full.
        options: more arguments of ``peft.LoraConfig``, for example ``{use_dora: true}``.
        seed: seed of the initial A.
        target_towers: module groups whose layers are adapted, of "image", "projector" and "text";
            None = "text" for the words of ``target_modules``, all for names.
        train_towers: module groups that train in full beside the adapter.
        modules_to_save: modules that train in full beside the adapter, by name or end of a name,
            such as "lm_head"; where word embeddings and head share a weight they are untied, as in
            peft, unless ``options`` has ``ensure_weight_tying``.
        trainable_token_indices: rows of the word embeddings that train; or name of an embedding ->
            rows.
        adapter: folder of a peft adapter to start from; None = a new one.
        adapter_mode: "continue" trains the same parameters on, "merge" adds them to the frozen
            weights and begins a new adapter.

    **Remembers** nothing of its own: A and B, r (d_in + d_out) numbers per layer, and what trains
    beside them are the model's. A checkpoint after "merge" needs the folder again.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``; ``parts()`` for
    towers.
    """

    def __init__(
        self,
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        target_modules: TargetModules | None = None,
        train_projector: bool = False,
        options: dict[str, Any] | None = None,
        seed: int = 0,
        target_towers: Sequence[str] | None = None,
        train_towers: Sequence[str] = (),
        modules_to_save: Sequence[str] = (),
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        adapter: str | None = None,
        adapter_mode: AdapterMode = "continue",
    ) -> None:
        super().__init__()
        words = "all" if target_modules is None else target_modules
        self.adapters = TaskAdapters(
            16 if rank is None else rank, alpha, dropout or 0.0, words, train_projector, seed
        )
        self.options = dict(options or {})
        saved = self.options.pop("modules_to_save", None) or ()
        self.modules_to_save = (*modules_to_save, *saved)
        rows = self.options.pop("trainable_token_indices", None)
        self.token_indices = trainable_token_indices or rows
        self.target_towers = None if target_towers is None else tuple(target_towers)
        projector = ("projector",) if train_projector else ()
        self.train_towers = tuple(dict.fromkeys((*train_towers, *projector)))
        if adapter_mode not in ("continue", "merge"):
            raise ValueError(f"adapter_mode is {adapter_mode!r}, expected 'continue' or 'merge'")
        both = sorted(set(self.target_towers or ()) & set(self.train_towers))
        if both or target_towers == []:
            raise ValueError(
                f"target_towers is {target_towers} and train_towers {list(self.train_towers)}: a "
                "tower is adapted or trained in full; name one or more in target_towers and others "
                "in train_towers"
            )
        self.adapter, self.adapter_mode = adapter, adapter_mode
        given = {"rank": rank, "alpha": alpha, "dropout": dropout}
        self._given = {name: value for name, value in given.items() if value is not None}
        self._has_targets = target_modules is not None or target_towers is not None

    @property
    def has_merged_start(self) -> bool:
        """Whether the frozen weights are those of the model with an adapter merged into them."""
        return self.adapter is not None and self.adapter_mode == "merge"

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the adapter into its target layers."""
        start = self._stored(model)
        able = require(model, *(("target_linears",) if start is None else ()), "freeze", by=self)
        root, prefix = root_of(able)
        saved = match_modules(root, self.modules_to_save)
        if start is None:
            found = select_linears(able, self.adapters.target_modules, self.target_towers)
        else:
            found = {f"{prefix}{n}": cast(Any, root.get_submodule(n)) for n in start.layers}
        inside = {id(part) for module in saved.values() for part in module.modules()}
        layers = {name: layer for name, layer in found.items() if id(layer) not in inside}
        _expect_layers(layers, saved)
        freeze_except(able, self.train_towers, self, [*layers.values(), *saved.values()])
        config = None if start is None else self._continued(root, start)
        self._train_beside(root, [n.removeprefix(prefix) for n in layers], saved, start)
        root, prefix = _root(model, layers)
        names = [name.removeprefix(prefix) for name in layers]
        config = self._config(root, names) if config is None else config
        is_plain = all(type(one) is nn.Linear for one in layers.values() if not _is_table(one))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.adapters.seed))
            _inject(root, config, is_plain)
        if start is not None:
            from mmcl.layers.peft_adapter import load_adapter

            load_adapter(root, start, _ADAPTER)
        if callable(locate := getattr(model, "locate_parameters", None)):
            locate()
        _share_inputs(root)

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the adapter into the weights inside the block."""
        from mmcl.layers.peft_lora import merged_lora

        return merged_lora(cast(nn.Module, model))

    def peft_config(self, model: VLM) -> dict[str, Any]:
        """Return the content of ``adapter_config.json`` of a peft folder.

        It fits ``peft_state`` and the model as transformers made it.

        Raises:
            ValueError: if the adapter does not fit that model, or a parameter that trains beside it
                is in no module that peft could hold.
        """
        if self.has_merged_start:
            raise ValueError(
                f"LoRA merged {self.adapter} into the model, so its new adapter fits no model that "
                "peft could load: export the whole model, --as transformers"
            )
        root, _ = _root(model, _adapted(cast(nn.Module, model)))
        config = cast(Any, root).peft_config[_ADAPTER].to_dict()
        saved = sorted(modules_in_full(root))
        config |= {
            "inference_mode": True, "target_modules": sorted(_adapted(root)),
            "modules_to_save": saved or None, **describe_base(root),
            "ensure_weight_tying": any(f"{name}.weight" in tied_names(root) for name in saved),
        }  # fmt: skip
        if config.get("task_type"):
            config["auto_mapping"] = None

        def default(value: Any) -> Any:
            return sorted(value) if isinstance(value, set | frozenset) else str(value)

        plain: dict[str, Any] = json.loads(json.dumps(config, default=default, sort_keys=True))
        return plain

    def _stored(self, model: Any) -> StoredAdapter | None:
        """Return the adapter to continue; one to merge is merged now, and None is returned."""
        if self.adapter is None:
            return None
        from mmcl.layers.peft_adapter import merge_adapter, read_adapter

        root, _ = root_of(model)
        found = read_adapter(self.adapter, root)
        if self.adapter_mode == "merge":
            merge_adapter(root, found)
            return None
        own = {"rank": found.rank, "alpha": found.alpha}
        for name, value in self._given.items():
            if name in own and value != own[name]:
                raise ValueError(
                    f"{name} is {value} and {self.adapter} has {own[name]}: leave {name} out, or "
                    "use adapter_mode 'merge', which begins a new adapter"
                )
        if self._has_targets or self.options or self.token_indices:
            raise ValueError(
                f"{self.adapter} has its own layers, options and tokens: leave target_modules, "
                "target_towers, options and trainable_token_indices out, or use adapter_mode "
                "'merge', which begins a new adapter"
            )
        return found

    def _continued(self, root: nn.Module, start: StoredAdapter) -> Any:
        from mmcl.layers.peft_adapter import continued_config

        return continued_config(root, start, self._given.get("dropout"))

    def _train_beside(
        self,
        root: nn.Module,
        names: Iterable[str],
        saved: Mapping[str, nn.Module],
        start: StoredAdapter | None,
    ) -> None:
        """Make trainable what trains in full beside the adapter, and untie the head as peft does.

        ``names`` are those of adapted layers, inside ``root`` as those of ``saved``.
        """
        owners = {name.rpartition(".")[0] for name in tied_names(root)}
        if owners & ({*saved, *names}) and not self.options.get("ensure_weight_tying"):
            untie_head(root)
        for module in saved.values():
            module.requires_grad_(True)
        parameters = dict(root.named_parameters(remove_duplicate=False))
        for name in () if start is None else start.trained:
            parameters[name].requires_grad_(True)
        words = cast(Any, root).get_input_embeddings if self.token_indices else None
        if words is not None and words().weight.requires_grad:
            raise ValueError(
                "trainable_token_indices choose rows of word embeddings that train in full: leave "
                "them out, or the embeddings out of modules_to_save and train_towers"
            )

    def _config(self, root: nn.Module, names: list[str]) -> Any:
        from peft import LoraConfig

        known = {field.name for field in fields(LoraConfig)} - set(_OURS)
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise ValueError(
                f"options has {', '.join(unknown)}, which peft.LoraConfig does not take here: "
                "rank, alpha, dropout and target_modules are arguments of LoRA itself"
            )
        defaults = {field.name: field.default for field in fields(LoraConfig)}
        for name, value in self.options.items():
            if name not in _OBEYED and value and value != defaults[name]:
                raise ValueError(
                    f"options has {name} {value!r}, which LoRA does not obey: leave it out; it "
                    f"obeys {', '.join(_OBEYED)}"
                )
        start = self.options.get("init_lora_weights", True)
        if isinstance(start, str) and start not in _HARMLESS_STARTS:
            raise ValueError(
                f"init_lora_weights is '{start}', which needs data or rewrites the frozen weights, "
                f"so checkpoints would not fit: use true, {' or '.join(_HARMLESS_STARTS)}"
            )
        kept = _filtered(names, {name: self.options.get(name) for name in _FILTERS})
        if self.options.get("lora_bias"):
            _expect_biases(root, kept)
        return LoraConfig(
            r=self.adapters.rank,
            lora_alpha=cast(int, self.adapters.alpha),
            lora_dropout=self.adapters.dropout,
            target_modules=kept,
            trainable_token_indices=_checked_rows(root, self.token_indices),
            **{name: v for name, v in self.options.items() if name in set(_OBEYED) - set(_FILTERS)},
        )


def peft_state(model: VLM) -> dict[str, Tensor]:
    """Return the adapter's weights, and those of modules that train in full.

    Names are relative to the model as transformers made it, without peft's adapter name; in
    ``adapter_model.safetensors`` each has the prefix "base_model.model.". Tensors are contiguous
    and on the CPU.
    """
    from peft import get_peft_model_state_dict

    root, _ = _root(model, _adapted(cast(nn.Module, model)))
    state = dict(get_peft_model_state_dict(root, save_embedding_layers=False))
    for name, module in modules_in_full(root).items():
        state |= {f"{name}.{key}": tensor for key, tensor in rounded_state(module).items()}
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def describe_base(root: Any) -> dict[str, Any]:
    """Return the entries of ``adapter_config.json`` by which peft finds the base model."""
    kind = type(root)
    path = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "base_model_name_or_path": path or None,
        "auto_mapping": {"base_model_class": kind.__name__, "parent_library": kind.__module__},
    }


def _root(model: VLM, targets: Iterable[str]) -> tuple[nn.Module, str]:
    """Return the module whose names an exported adapter uses, and their prefix in the model.

    It is the language model ``model.lm`` if all target layers are in it, else the model.
    """
    root, prefix = root_of(model)
    is_inner = all(name.startswith(prefix) for name in targets)
    return (root, prefix) if is_inner else (cast(nn.Module, model), "")


def _is_table(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


def _expect_layers(layers: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> None:
    if not layers:
        raise ValueError(
            f"modules_to_save ({', '.join(saved)}) holds all target layers, which train in full "
            "there: choose other target_modules"
        )


def _filtered(names: list[str], filters: Mapping[str, Any]) -> list[str]:
    """Return the names that peft's filters of layers leave."""
    if not any(value is not None for value in filters.values()):
        return names
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ends = sorted({name.rpartition(".")[2] for name in names})
    config = LoraConfig(target_modules=ends, **filters)
    kept = [name for name in names if check_target_module_exists(config, name)]
    if not kept:
        given = ", ".join(f"{name} {value!r}" for name, value in filters.items() if value)
        raise ValueError(f"options leave no target layer ({given}): choose others")
    return kept


def _expect_biases(root: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        if getattr(root.get_submodule(name), "bias", None) is None:
            raise ValueError(
                f"options has lora_bias, and '{name}' has no bias that it could be merged into: "
                "leave lora_bias out"
            )


def _checked_rows(root: Any, rows: Any) -> Any:
    """Return rows of word embeddings, checked against their tables."""
    if rows is None:
        return None
    if not callable(getattr(root, "get_input_embeddings", None)):
        raise ValueError(
            "trainable_token_indices needs a model of transformers, whose word embeddings it knows"
        )
    named = rows if isinstance(rows, Mapping) else {"": rows}
    for name, own in named.items():
        module = root.get_input_embeddings()
        if name:
            module = next(iter(match_modules(root, [name]).values()))
        size = int(module.weight.shape[0])
        if len(set(own)) != len(own) or not own or min(own) < 0 or max(own) >= size:
            raise ValueError(
                f"trainable_token_indices is {own}: give different rows from 0 to {size - 1}"
            )
    return rows


def _inject(root: nn.Module, config: Any, is_plain_linear: bool) -> None:
    from peft import inject_adapter_in_model

    from mmcl.layers.peft_lora import FusedLoraLinear

    if is_plain_linear:
        config._register_custom_module({nn.Linear: FusedLoraLinear})
    before = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    inject_adapter_in_model(config, root, _ADAPTER)
    # peft freezes all but the adapter, also a projector that is to be trained.
    for parameter, is_trainable in before:
        parameter.requires_grad_(is_trainable)
    old = {id(parameter) for parameter, _ in before}
    for parameter in root.parameters():
        is_narrow = parameter.is_floating_point() and parameter.element_size() < 4
        if id(parameter) not in old and is_narrow:
            parameter.data = parameter.data.float()


def _share_inputs(root: nn.Module) -> None:
    from mmcl.layers.peft_lora import FusedLoraLinear
    from mmcl.layers.shared_input import share_inputs

    share_inputs(root, FusedLoraLinear)


def _adapted(root: nn.Module) -> list[str]:
    from peft.tuners.lora import LoraLayer

    return [name for name, layer in root.named_modules() if isinstance(layer, LoraLayer)]
