"""Target layers of adapters, chosen by words, names or towers, and what else trains beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, cast

from torch import nn

from mmcl.core import VLM, require, trainable_parameters
from mmcl.core.model import BASE_LAYER_NAMES

TargetModules = str | list[str]
"""Target layers: a word of ``model.target_linears``, a regular expression, or ends of names."""
_WORDS = ("all", "attention", "mlp")
_ALL_LINEAR = "all-linear"
_OUTER_SUFFIXES = {
    "attention": (
        "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "projection_layer", "qkv", "proj",
    ),
    "mlp": (
        "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "linear_1", "linear_2", "linear_fc1",
        "linear_fc2",
    ),
}  # fmt: skip
"""Names of the linear layers of vision towers and projectors."""


def freeze_and_target(
    model: VLM, target_modules: TargetModules, train_projector: bool, by: object
) -> dict[str, nn.Linear]:
    """Freeze a model and return its target linear layers: those of a language model, if it has one.

    Args:
        model: with ``target_linears`` and ``freeze``.
        target_modules: "all", or those of "attention" or "mlp"; of "all" those that a regular
            expression matches or whose names end with one of a list.
        train_projector: leave the projector between the towers as it is.
        by: the strategy, for errors.

    Returns:
        full name -> layer, in the model's order.

    Raises:
        TypeError: if the model lacks a member.
        ValueError: if there is no such layer, no projector to train, or the user left a part
            trainable that is frozen here.
    """
    able = require(model, "target_linears", "freeze", by=by)
    among = None if target_modules in _WORDS else able.target_linears("all")
    found = select_linears(able, target_modules, None, among)
    freeze_except(able, ("projector",) if train_projector else (), by, found.values())
    return found


def select_linears(
    model: Any,
    target_modules: TargetModules,
    towers: Sequence[str] | None,
    among: Collection[str] | None = None,
) -> dict[str, nn.Linear]:
    """Return target linear layers by full name, in the model's order.

    Args:
        model: with ``target_linears``; with ``parts`` if there are ``towers``.
        target_modules: "all", "attention" or "mlp"; "all-linear" = every linear layer but the head,
            as in peft; a regular expression that matches whole names; or a list of names and ends
            of names. Names are those of ``model.lm`` if there is one.
        towers: parts of the model that the layers are in; None = those of ``target_linears`` for a
            word, all parts for "all-linear" and names.
        among: full names of the layers that names and regular expressions may choose; None = all.

    Raises:
        TypeError: if the model has no ``parts``.
        ValueError: if there is no such layer, part or list entry, or an entry is no linear layer.
    """
    if not target_modules:
        raise ValueError(
            "target_modules is empty: give 'all', 'attention', 'mlp', a regular expression or names"
        )
    if target_modules in _WORDS:
        found = _by_word(model, str(target_modules), towers)
    else:
        found = _by_name(model, target_modules, towers, among)
    if not found:
        where = "" if towers is None else f" in {', '.join(towers)}"
        raise ValueError(
            f"model.target_linears({target_modules!r}) is empty{where}: choose other "
            "target_modules, or check the model"
        )
    return found


def root_of(model: Any) -> tuple[nn.Module, str]:
    """Return the model of transformers ``model.lm`` and "lm."; without one, the model and ""."""
    inner = getattr(model, "lm", None)
    return (inner, "lm.") if isinstance(inner, nn.Module) else (model, "")


def parameters_in(model: Any, towers: Iterable[str]) -> set[int]:
    """Return the ids of the parameters of some parts of a model.

    Raises:
        TypeError: if the model has no ``parts``.
        ValueError: if there is no such part.
    """
    if not callable(getattr(model, "parts", None)):
        raise TypeError(
            f"{type(model).__name__} has no method parts() that names its towers: add it, or leave "
            "target_towers and train_towers out"
        )
    parts, wanted = model.parts(), list(towers)
    if unknown := [name for name in wanted if name not in parts]:
        raise ValueError(
            f"the model has no part {unknown[0]!r}: choose of {', '.join(sorted(parts))}"
        )
    return {id(parameter) for name in wanted for parameter in parts[name]}


def _by_word(model: Any, word: str, towers: Sequence[str] | None) -> dict[str, nn.Linear]:
    if towers is None:
        found: dict[str, nn.Linear] = model.target_linears(word)
        return found
    inside, root = parameters_in(model, towers), root_of(model)[0]
    own = model.target_linears(word) if "text" in towers else {}
    text = parameters_in(model, ["text"]) if "text" in model.parts() else set()
    suffixes = None if word == "all" else _OUTER_SUFFIXES[word]
    chosen = {
        name
        for name, layer in cast(nn.Module, model).named_modules()
        if isinstance(layer, nn.Linear) and id(layer.weight) in inside - text
        if layer is not _head(root)
        if suffixes is None or name.rpartition(".")[2] in suffixes
    } | set(own)
    modules = dict(cast(nn.Module, model).named_modules())
    return {name: cast(nn.Linear, layer) for name, layer in modules.items() if name in chosen}


def _by_name(
    model: Any,
    wanted: TargetModules,
    towers: Sequence[str] | None,
    among: Collection[str] | None,
) -> dict[str, nn.Linear]:
    root, prefix = root_of(model)
    inside = None if towers is None else parameters_in(model, towers)
    found: dict[str, nn.Linear] = {}
    others: dict[str, nn.Module] = {}
    used: set[str] = set()
    for name, layer in root.named_modules():
        match = _matched(name, wanted) if name else None
        if match is None or (wanted == _ALL_LINEAR and layer is _head(root)):
            continue
        if not isinstance(layer, nn.Linear):
            others[name] = layer
        elif among is not None and f"{prefix}{name}" not in among:
            continue
        elif inside is None or id(layer.weight) in inside:
            found[f"{prefix}{name}"] = layer
            used.add(match)
    if isinstance(wanted, str):
        if not found and wanted != _ALL_LINEAR:
            return _own_word(model, wanted)
        return found
    if missing := [end for end in wanted if end not in used]:
        known = {name.rpartition(".")[2] for name, m in root.named_modules() if _is_linear(m)}
        near = get_close_matches(missing[0], known, n=3) or sorted(known)[:8]
        what = next((type(m).__name__ for n, m in others.items() if n.endswith(missing[0])), "")
        what = f"matches {what}, no linear layer" if what else "matches no linear layer"
        where = "" if towers is None else f" in {', '.join(towers)}"
        where = where if among is None else " among model.target_linears('all')"
        raise ValueError(
            f"target_modules has '{missing[0]}', which {what}{where}: near names are "
            f"{', '.join(near)}"
        )
    return found


def _own_word(model: Any, word: str) -> dict[str, nn.Linear]:
    """Return the layers of a word that only the model itself may know."""
    try:
        found: dict[str, nn.Linear] = model.target_linears(word)
    except ValueError as error:
        raise ValueError(
            f"{error}; as a regular expression it matches no linear layer (one must match a whole "
            f"name, for example '.*q_proj'), and a name is given in a list, ['{word}']"
        ) from None
    return found


def _matched(name: str, wanted: TargetModules) -> str | None:
    """Return the entry of ``target_modules`` that a name matches, or None."""
    if wanted == _ALL_LINEAR:
        return _ALL_LINEAR
    if isinstance(wanted, str):
        return wanted if re.fullmatch(wanted, name) else None
    return next((end for end in wanted if f".{name}".endswith(f".{end}")), None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _head(root: Any) -> nn.Module | None:
    """Return the language head of a transformers model."""
    get = getattr(root, "get_output_embeddings", None)
    return get() if callable(get) else None


def freeze_except(
    model: Any, towers: Sequence[str], by: object, targets: Iterable[nn.Module] = ()
) -> None:
    """Freeze all parameters but those of some towers that train.

    Args:
        model: with ``freeze``.
        towers: towers, or "projector", that stay trainable in full.
        by: the strategy, for errors.
        targets: layers that get adapters.

    Raises:
        ValueError: if nothing in a tower trains, or ``freeze`` of the model left a part trainable
            that would be frozen here without a word.
    """
    expect_frozen_as_set(model, by, towers, targets)
    before = trainable_parameters(model)
    model.freeze("image", "text")
    kept: list[nn.Parameter] = []
    for tower in dict.fromkeys(towers):
        for parameter in before.values():
            parameter.requires_grad_(True)
        model.freeze(tower)
        own = [p for p in before.values() if not p.requires_grad]
        if not own:
            setting = "train_projector is True" if tower == "projector" else "train_towers is set"
            advice = "train_projector False" if tower == "projector" else "it out of train_towers"
            raise ValueError(
                f"{setting}, and model.freeze('{tower}') of {type(model).__name__} freezes nothing "
                f"that trains: leave {advice}, or '{tower}' out of the model's own freeze"
            )
        kept += own
    for _, parameter in model.named_parameters():
        parameter.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)


def expect_frozen_as_set(
    model: Any, by: object, trained: Iterable[str] = (), targets: Iterable[nn.Module] = ()
) -> None:
    """Check that a strategy freezes no part that ``freeze`` of a generative model left trainable.

    Projector and language model may be frozen where only the image tower is, which is the default.

    Raises:
        ValueError: naming the parts.
    """
    parts = model.parts() if callable(getattr(model, "parts", None)) else {}
    left = {name for name, own in parts.items() if any(p.requires_grad for p in own)}
    if "projector" not in parts or left == {"projector", "text"}:
        return
    adapted = {id(parameter) for layer in targets for parameter in layer.parameters()}
    known = {name for name in left if any(id(p) in adapted for p in parts[name])} | set(trained)
    if lost := sorted(left - known):
        names, kind = ", ".join(f"'{name}'" for name in lost), type(by).__name__
        train = f"give LoRA train_towers [{names}]" if kind == "LoRA" else "use LoRA or Finetune"
        raise ValueError(
            f"freeze of the model leaves {names} trainable, and {kind} freezes it: add {names} to "
            f"freeze, or {train}"
        )


def modules_in_full(root: nn.Module) -> dict[str, nn.Module]:
    """Return the largest modules that train in full, by name; adapters are not among them.

    They are the ``modules_to_save`` of peft. A module with a weight that others share, such as tied
    word embeddings, is listed by itself.

    Raises:
        ValueError: if a trainable parameter is in no such module.
    """
    counts = Counter(id(p) for m in root.modules() for p in m.parameters(recurse=False))
    shared = {number for number, count in counts.items() if count > 1}
    return dict(_in_full("", root, shared))


def _in_full(name: str, module: nn.Module, shared: set[int]) -> Iterator[tuple[str, nn.Module]]:
    is_adapter = any(hasattr(module, own) for own in (*BASE_LAYER_NAMES, "token_adapter"))
    if is_adapter or not any(p.requires_grad for p in module.parameters()):
        return
    own = dict(module.named_parameters(recurse=False))
    below = {id(p) for child in module.children() for p in child.parameters()}
    is_whole = all(p.requires_grad for p in module.parameters()) and not below & shared
    if name and is_whole and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        yield name, module
        return
    if trained := [key for key, parameter in own.items() if parameter.requires_grad]:
        raise ValueError(
            f"'{name}.{trained[0]}' trains and is in no module of its own, which is all that an "
            "adapter of peft can hold: export the whole model, --as transformers"
        )
    for key, child in module.named_children():
        yield from _in_full(f"{name}.{key}" if name else key, child, shared)


def tied_names(root: Any) -> list[str]:
    """Return the names of the weight that word embeddings and head share, [] if they do not."""
    get_in = getattr(root, "get_input_embeddings", None)
    get_out = getattr(root, "get_output_embeddings", None)
    head = get_out() if callable(get_out) else None
    if head is None or not callable(get_in) or get_in().weight is not head.weight:
        return []
    every = root.named_parameters(remove_duplicate=False)
    return [name for name, parameter in every if parameter is head.weight]


def untie_head(root: Any) -> None:
    """Give the head of a transformers model a weight of its own, equal to the word embeddings."""
    head = root.get_output_embeddings()
    weight = head.weight
    head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    for config in (root.config, root.config.get_text_config()):
        config.tie_word_embeddings = False


def match_modules(root: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules whose name is, or ends with, one of ``wanted``; by full name.

    Raises:
        ValueError: if one matches no module.
    """
    known = dict(root.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for end in wanted:
        own = {name: module for name, module in known.items() if f".{name}".endswith(f".{end}")}
        if not own or not end:
            near = get_close_matches(end, {n.rpartition(".")[2] for n in known} | set(known), n=3)
            raise ValueError(
                f"the model has no module '{end}': near names are {', '.join(near) or 'none'}"
            )
        found |= own
    return found
