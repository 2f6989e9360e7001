"""A peft adapter in a folder: read and check it, merge it into a model or let it train further.

Nothing is loaded as a pickle: a .bin file is read with torch's ``weights_only``.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mmcl.layers.target_layers import tied_names, untie_head

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = "non_lora_trainables.bin"
"""Weights that LLaVA's own scripts train beside an adapter, the projector's."""
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
_OBEYED = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
    "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices",
    "base_model_name_or_path", "ensure_weight_tying",
    # The layers of an adapter are those that it has weights for.
    "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "megatron_core",
    "loftq_config", "runtime_config", "qalora_group_size",
}  # fmt: skip
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights under which peft leaves the weights of the model as they are."""
_RENAMED = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
)
"""Beginnings of names in transformers 4, and in LLaVA's own code, and in transformers 5."""


@dataclass(frozen=True)
class LoRAWeights:
    """Weights of one layer of an adapter.

    Attributes:
        tensors: "lora_A" (r, d_in), "lora_B" (d_out, r), with DoRA "lora_magnitude_vector"
            (d_out,); of an embedding "lora_embedding_A" (r, V) and "lora_embedding_B" (D, r).
        rank: r.
        alpha: the scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float


@dataclass(frozen=True)
class StoredAdapter:
    """A LoRA adapter of peft that fits a model, by the model's names.

    Attributes:
        folder: where it was read.
        rank: r of layers that state no other.
        alpha: of layers that state no other.
        dropout: of the adapter's input in training.
        use_rslora: the scale is alpha / sqrt(r).
        use_dora: magnitude and direction are apart.
        layers: name -> weights of a layer.
        others: name -> parameter that replaces that of the model.
        trained: names of those of ``others`` that trained beside the adapter.
        tokens: name of an embedding -> rows (n,) and their values (n, D).
        is_tied: word embeddings and head trained as one weight.
    """

    folder: Path
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    use_dora: bool
    layers: Mapping[str, LoRAWeights]
    others: Mapping[str, Tensor]
    trained: tuple[str, ...]
    tokens: Mapping[str, tuple[list[int], Tensor]]
    is_tied: bool


def read_adapter(folder: str, root: nn.Module) -> StoredAdapter:
    """Read a peft adapter and find the layers of a model that it belongs to.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors`` (or .bin); LLaVA's
            ``non_lora_trainables.bin`` is read as well.
        root: model of transformers, whose names are those of the adapter, also by their spelling in
            transformers 4 and in LLaVA's own code.

    Raises:
        FileNotFoundError: if there is no such folder or file.
        ValueError: if a file cannot be read, a setting is not supported, or weights do not fit.
    """
    path = _folder(folder)
    config = _read_config(path / CONFIG)
    _check_config(path, config)
    state, beside = _read_weights(path)
    known = {name for name, _ in root.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, tuple[int, float]] = {}
    tokens: dict[str, tuple[list[int], Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _LORA.fullmatch(key):
            name = _located(path, match[1], known)
            layers.setdefault(name, {})[match[2]] = tensor
            alphas[name] = _rank_and_alpha(config, match[1])
        elif match := _TOKENS.fullmatch(key):
            name = _located(path, match[1], known)
            tokens[name] = (_token_indices(path, config, match[1]), tensor)
        else:
            others[key] = tensor
    if not layers:
        raise ValueError(f"{path} has no LoRA weights (lora_A, lora_B): give a LoRA adapter")
    parameters = dict(root.named_parameters(remove_duplicate=False))
    saved = config.get("modules_to_save") or []
    named = {name: _located(path, name, parameters.keys()) for name in [*others, *beside]}
    trained = [named[n] for n in others if any(f".{m}." in f".{n}" for m in saved)]
    found = StoredAdapter(
        path, int(config["r"]), config.get("lora_alpha", 8),
        float(config.get("lora_dropout") or 0.0), bool(config.get("use_rslora")),
        bool(config.get("use_dora")),
        {name: LoRAWeights(own, *alphas[name]) for name, own in layers.items()},
        {named[name]: tensor for name, tensor in {**others, **beside}.items()},
        tuple(dict.fromkeys([*trained, *(named[name] for name in beside)])), tokens,
        bool(config.get("ensure_weight_tying")),
    )  # fmt: skip
    _check_fit(found, root, parameters)
    _check_base(path, config, root)
    return found


def _folder(folder: str) -> Path:
    path = Path(folder).expanduser()
    if (path / CONFIG).is_file():
        return path
    if path.is_dir():
        inner = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        advice = f"give {path / inner[0]}" if inner else "give the folder that peft wrote"
        raise FileNotFoundError(f"adapter is {folder}, which has no {CONFIG}: {advice}")
    raise FileNotFoundError(
        f"adapter is {folder}, and there is no such folder: give one that peft's save_pretrained "
        "or 'mmcl export --as peft' wrote; download one from the hub first "
        f"(hf download {folder} --local-dir FOLDER)"
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} is not JSON ({error}): write it again with peft") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is {type(config).__name__}, expected an object of settings")
    return config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a ValueError for settings of an adapter that would not be obeyed."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} is an adapter of peft_type {config.get('peft_type')!r}: only 'LORA' can be "
            "continued or merged; merge others with peft and give the whole model"
        )
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"r is {rank!r} in {path / CONFIG}, expected 1 or more")
    start = config.get("init_lora_weights", True)
    if start not in _HARMLESS_STARTS:
        raise ValueError(
            f"init_lora_weights is {start!r} in {path / CONFIG}, which rewrites the weights of the "
            "model: save it with peft's path_initial_model_for_weight_conversion, as plain LoRA"
        )
    defaults: dict[str, Any] = {field.name: field.default for field in fields(LoraConfig)}
    skipped = _OBEYED | _WITHOUT_EFFECT | {"init_lora_weights"}
    for name, value in config.items():
        is_off = not value or value == defaults.get(name)
        if name not in skipped and not is_off:
            raise ValueError(
                f"{name} is {value!r} in {path / CONFIG}, which is not supported here: merge the "
                "adapter with peft's merge_and_unload and give the whole model"
            )


def _check_base(path: Path, config: Mapping[str, Any], root: Any) -> None:
    """Warn if an adapter names another base model."""
    own = str(getattr(getattr(root, "config", None), "_name_or_path", "") or "")
    named = str(config.get("base_model_name_or_path") or "")
    if own and named and Path(own).name.lower() != Path(named).name.lower():
        warnings.warn(
            f"the adapter {path} was trained on {named} and the model is {own}: its weights fit, "
            "but they mean something on their own base alone; check that the two are the same, or "
            "move the adapter: mmcl upgrade check ADAPTER --to BASE, then mmcl recycle",
            stacklevel=2,
        )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return an adapter's weights, and those beside it, by their names in the model."""
    files = [path / name for name in _WEIGHTS if (path / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{path} has no {' or '.join(_WEIGHTS)}: give a whole adapter")
    file = files[0]
    try:
        state = load_peft_weights(str(path), device="cpu")
        file = path / _BESIDE
        beside = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
    except Exception as error:  # each format raises errors of its own
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(
            f"{file} cannot be read ({reason}): write it again as safetensors, with peft's "
            "save_pretrained"
        ) from error
    return _plain_names(state), _plain_names(beside)


def _plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights by names without peft's prefixes and without the name of the adapter."""
    plain = {}
    for name, tensor in state.items():
        inner = name.removeprefix("module.").removeprefix(_PREFIX)
        inner = inner.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        plain[inner.replace(".base_layer.", ".")] = tensor
    return plain


def _located(path: Path, name: str, known: Any) -> str:
    """Return the model's name of a module or parameter of an adapter.

    Raises:
        ValueError: if the model has none.
    """
    for candidate in _spellings(name):
        if candidate in known:
            return candidate
    near = get_close_matches(name, [n for n in known if n], n=2, cutoff=0.4)
    raise ValueError(
        f"{path} has weights for '{name}', which the model does not have (near names: "
        f"{', '.join(near) or 'none'}): the adapter is of another model; give its base model, "
        "named in adapter_config.json"
    )


def _spellings(name: str) -> Iterator[str]:
    yield name
    for old, new in _RENAMED:
        if f"{name}.".startswith(old):
            yield f"{new}{f'{name}.'.removeprefix(old)}".removesuffix(".")
    yield f"model.{name}"


def _rank_and_alpha(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Return rank and alpha that an adapter's settings state for one of its layers."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    rank = ranks.get(get_pattern_key(ranks.keys(), name), config["r"])
    alpha = alphas.get(get_pattern_key(alphas.keys(), name), config.get("lora_alpha", 8))
    return int(rank), alpha


def _token_indices(path: Path, config: Mapping[str, Any], name: str) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        ends = [end for end in indices if f".{name}".endswith(f".{end}")]
        indices = indices[ends[0]] if ends else None
    if not isinstance(indices, list):
        raise ValueError(f"{path / CONFIG} has no trainable_token_indices for '{name}'")
    return [int(index) for index in indices]


def _check_fit(
    adapter: StoredAdapter, root: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Raise a ValueError if a weight of an adapter does not fit the model."""
    for name, own in adapter.layers.items():
        layer = root.get_submodule(name)
        shapes = _shapes(adapter, name, layer)
        for kind in own.tensors.keys() | shapes.keys():
            shape = shapes.get(kind, "none")
            got = tuple(own.tensors[kind].shape) if kind in own.tensors else "missing"
            if got != shape:
                raise ValueError(
                    f"{kind} of '{name}' in {adapter.folder} is {got}, expected {shape}: the "
                    "adapter is of another model, or its r and rank_pattern are others"
                )
    for name, tensor in adapter.others.items():
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"'{name}' is {tuple(tensor.shape)} in {adapter.folder} and "
                f"{tuple(parameters[name].shape)} in the model: give the model that the adapter "
                "was trained on, with the same vocabulary"
            )
    for name, (indices, rows) in adapter.tokens.items():
        table = cast(Tensor, root.get_submodule(name).weight)
        if rows.shape != (len(indices), table.shape[1]) or max(indices) >= len(table):
            raise ValueError(
                f"trainable tokens of '{name}' in {adapter.folder} are {tuple(rows.shape)} for "
                f"{len(indices)} indices, and the model's embeddings {tuple(table.shape)}"
            )


def _shapes(adapter: StoredAdapter, name: str, layer: nn.Module) -> dict[str, tuple[int, ...]]:
    rank = adapter.layers[name].rank
    if isinstance(layer, nn.Linear):
        d_out, d_in = layer.out_features, layer.in_features
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (rank, d_in), "lora_B": (d_out, rank)}
        return shapes | ({"lora_magnitude_vector": (d_out,)} if adapter.use_dora else {})
    if isinstance(layer, nn.Embedding) and not adapter.use_dora:
        size = (layer.num_embeddings, layer.embedding_dim)
        return {"lora_embedding_A": (rank, size[0]), "lora_embedding_B": (size[1], rank)}
    raise ValueError(
        f"{adapter.folder} adapts '{name}', a {type(layer).__name__}: only linear layers and, "
        "without DoRA, embeddings can be continued or merged"
    )


@torch.no_grad()
def merge_adapter(root: nn.Module, adapter: StoredAdapter) -> None:
    """Add an adapter to the weights of a model, in place; sums are float64, rounded once.

    Raises:
        ValueError: if a weight is quantized.
    """
    _untie_if_apart(root, adapter)
    _set_others(root, adapter)
    for name, own in adapter.layers.items():
        layer = root.get_submodule(name)
        weight = cast(nn.Parameter, layer.weight)
        if not weight.is_floating_point():
            raise ValueError(
                f"'{name}' is quantized, so {adapter.folder} cannot be merged into it: use "
                "adapter_mode 'continue', or load the model without quantization"
            )
        weight.data.copy_(_merged(adapter, own, weight))
    for name, (indices, rows) in adapter.tokens.items():
        table = cast(nn.Parameter, root.get_submodule(name).weight)
        table.data[indices] = rows.to(table)


def _merged(adapter: StoredAdapter, own: LoRAWeights, weight: Tensor) -> Tensor:
    wide = {kind: tensor.to(weight.device, torch.float64) for kind, tensor in own.tensors.items()}
    scale = own.alpha / (math.sqrt(own.rank) if adapter.use_rslora else own.rank)
    if "lora_embedding_A" in wide:
        delta = (wide["lora_embedding_B"] @ wide["lora_embedding_A"]).T
    else:
        delta = wide["lora_B"] @ wide["lora_A"]
    merged: Tensor = weight.double() + scale * delta
    if not adapter.use_dora:
        return merged
    length: Tensor = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    return wide["lora_magnitude_vector"][:, None] / length * merged


@torch.no_grad()
def load_adapter(root: nn.Module, adapter: StoredAdapter, name: str) -> None:
    """Copy the weights of an adapter into those that peft injected under a name."""
    for layer_name, own in adapter.layers.items():
        layer: Any = root.get_submodule(layer_name)
        for kind, tensor in own.tensors.items():
            held = getattr(layer, kind)[name]
            target = held if isinstance(held, Tensor) else held.weight
            target.data.copy_(tensor)
    for layer_name, (_, rows) in adapter.tokens.items():
        wrapper: Any = root.get_submodule(layer_name)
        wrapper.token_adapter.trainable_tokens_delta[name].data.copy_(rows)


def _untie_if_apart(root: nn.Module, adapter: StoredAdapter) -> None:
    """Untie word embeddings and head if an adapter changes one of them, or both in two ways.

    So does peft, unless ``ensure_weight_tying`` is set.
    """
    tied = tied_names(root)
    adapted = [name for name in tied if name.rpartition(".")[0] in adapter.layers]
    stored = [adapter.others[name] for name in tied if name in adapter.others]
    is_one = adapter.is_tied and all(torch.equal(tensor, stored[0]) for tensor in stored)
    if adapted or (stored and not is_one):
        untie_head(root)


@torch.no_grad()
def _set_others(root: nn.Module, adapter: StoredAdapter) -> None:
    parameters = dict(root.named_parameters(remove_duplicate=False))
    for name, tensor in adapter.others.items():
        parameters[name].data.copy_(tensor)


def continued_config(root: nn.Module, adapter: StoredAdapter, dropout: float | None) -> Any:
    """Set the weights beside an adapter, and return the config that injects an equal one."""
    _untie_if_apart(root, adapter)
    _set_others(root, adapter)
    ranks = {_exactly(n): o.rank for n, o in adapter.layers.items() if o.rank != adapter.rank}
    alphas = {_exactly(n): o.alpha for n, o in adapter.layers.items() if o.alpha != adapter.alpha}
    indices = {name: rows for name, (rows, _) in adapter.tokens.items()}
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),
        lora_dropout=adapter.dropout if dropout is None else dropout,
        target_modules=list(adapter.layers),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        trainable_token_indices=indices or None,
    )


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"
