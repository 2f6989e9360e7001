"""LoRA trains one low-rank adapter of a frozen model on all tasks; the baseline of LoRA methods.

Paper: Hu et al. 2021, arXiv:2106.09685. As sequential fine-tuning in Guo et al. 2025,
arXiv:2508.07307.
Code followed: none; the layers are peft's, with a fused forward for their plain case.
Differs: no dropout by default; adapters of a half-precision model are float32 and their products
are in the model's precision, where peft widens the activations.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmcl.core import VLM, Strategy
from mmcl.core.seeding import hash_seed
from mmcl.layers.adapters import TargetModules, TaskAdapters

_ROOT = "lm"
_ADAPTER = "default"
_OURS = ("r", "lora_alpha", "lora_dropout", "target_modules", "peft_type")
_HARMLESS_STARTS = ("gaussian", "orthogonal")


class LoRA(Strategy):
    """Low-rank adaptation: one peft LoRA adapter, trained on one task after another.

    ``W x + alpha / rank * B A x`` in the model's target layers (a generative model's are in its
    language model); everything else is frozen. In a chain it comes first, so that the others (EWC,
    LwF) see the trainable parameters.

    Args:
        rank: r of A (r, d_in) and B (d_out, r).
        alpha: the scale of the adapter is alpha / rank; None = 2 * rank.
        dropout: of the adapter's input in training, 0 to below 1; 0 is faster.
        target_modules: "all" linear layers, or those of "attention" or "mlp".
        train_projector: train the projector between the towers as well.
        options: more arguments of ``peft.LoraConfig``, for example ``{use_dora: true}``.
        seed: seed of the initial A.

    **Remembers** nothing of its own: A and B, r (d_in + d_out) numbers per layer, are the model's.

    **Asks of the model** ``target_linears(target_modules)``, ``freeze(*towers)``.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        target_modules: TargetModules = "all",
        train_projector: bool = False,
        options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adapters = TaskAdapters(rank, alpha, dropout, target_modules, train_projector, seed)
        self.options = dict(options or {})

    def attach(self, model: VLM) -> None:
        """Freeze the model and inject the adapter into its target layers."""
        linears = self.adapters.freeze(model, by=self)
        root, prefix = _root(model, linears)
        names = [name.removeprefix(prefix) for name in linears]
        is_plain_linear = all(type(linear) is nn.Linear for linear in linears.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(self.adapters.seed))
            _inject(root, self._config(names), is_plain_linear)

    def merged_adapters(self, model: VLM) -> AbstractContextManager[None]:
        """Merge the adapter into the weights inside the block."""
        from mmcl.layers.peft_lora import merged_lora

        return merged_lora(cast(nn.Module, model))

    def peft_config(self, model: VLM) -> dict[str, Any]:
        """Return the content of ``adapter_config.json`` of a peft folder.

        It fits ``peft_state`` and the model as transformers made it.
        """
        root, _ = _root(model, _adapted(cast(nn.Module, model)))
        config = cast(Any, root).peft_config[_ADAPTER].to_dict()
        config |= {"inference_mode": True, "target_modules": sorted(_adapted(root))}
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in _others(root)})
        config["modules_to_save"] = config["modules_to_save"] or None
        path = getattr(getattr(root, "config", None), "_name_or_path", None)
        config["base_model_name_or_path"] = path or None

        def default(value: Any) -> Any:
            return sorted(value) if isinstance(value, set | frozenset) else str(value)

        plain: dict[str, Any] = json.loads(json.dumps(config, default=default, sort_keys=True))
        return plain

    def _config(self, names: list[str]) -> Any:
        from peft import LoraConfig

        known = {field.name for field in fields(LoraConfig)} - set(_OURS)
        unknown = sorted(set(self.options) - known)
        if unknown:
            raise ValueError(
                f"options has {', '.join(unknown)}, which peft.LoraConfig does not take here: "
                "rank, alpha, dropout and target_modules are arguments of LoRA itself"
            )
        start = self.options.get("init_lora_weights", True)
        if isinstance(start, str) and start not in _HARMLESS_STARTS:
            raise ValueError(
                f"init_lora_weights is '{start}', which needs data or rewrites the frozen weights, "
                f"so checkpoints would not fit: use true, {' or '.join(_HARMLESS_STARTS)}"
            )
        return LoraConfig(
            r=self.adapters.rank,
            lora_alpha=cast(int, self.adapters.alpha),
            lora_dropout=self.adapters.dropout,
            target_modules=names,
            **self.options,
        )


def peft_state(model: VLM) -> dict[str, Tensor]:
    """Return the adapter's weights, and those of a trainable projector.

    Names are relative to the model as transformers made it, without peft's adapter name; in
    ``adapter_model.safetensors`` each has the prefix "base_model.model.". Tensors are contiguous
    and on the CPU.
    """
    from peft import get_peft_model_state_dict

    root, _ = _root(model, _adapted(cast(nn.Module, model)))
    state = dict(get_peft_model_state_dict(root, save_embedding_layers=False))
    state |= _others(root)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _root(model: VLM, targets: Iterable[str]) -> tuple[nn.Module, str]:
    """Return the module whose names an exported adapter uses, and their prefix in the model.

    It is the language model ``model.lm`` if all target layers are in it, else the model.
    """
    inner, prefix = getattr(model, _ROOT, None), f"{_ROOT}."
    is_inner = isinstance(inner, nn.Module) and all(name.startswith(prefix) for name in targets)
    return (cast(nn.Module, inner), prefix) if is_inner else (cast(nn.Module, model), "")


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


def _adapted(root: nn.Module) -> list[str]:
    from peft.tuners.lora import LoraLayer

    return [name for name, layer in root.named_modules() if isinstance(layer, LoraLayer)]


def _others(root: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters outside the adapter."""
    adapted = tuple(f"{name}." for name in _adapted(root))
    return {
        name: parameter
        for name, parameter in root.named_parameters()
        if parameter.requires_grad and not name.startswith(adapted)
    }
