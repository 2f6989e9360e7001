"""Optimizer of a module: named parameter groups with rates and weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mmcl.core import Strategy
from mmcl.core.model import module_stacks, without_adapters

ADAPTER, PROMPT, HEAD = "adapter", "prompt", "head"
_DEFAULT = "default"
_INPUT = re.compile("embed|token|cls|patch|stem")
"""Words in the names of the parameters below a tower's first block."""


@dataclass(frozen=True)
class ParamGroup:
    """Optimizer settings of the parameters that one entry of ``param_groups`` matches.

    Args:
        learning_rate: their learning rate; None = the optimizer's.
        lr_scale: factor of the optimizer's learning rate, instead of ``learning_rate``.
        weight_decay: of their weights; None = the optimizer's. Biases, norms and other vectors have
            none, and prompts and keys only if the entry is ``prompt``.
        layer_decay: layer-wise decay of the learning rate in a tower, above 0 and up to 1:
            ``layer_decay ** (L + 1 - i)`` in block i of 1 to L, with i = 0 for embeddings and L + 1
            for what follows the blocks (Bao et al. 2021, arXiv:2106.08254).

    Raises:
        ValueError: if a value is out of range, or both kinds of rate are given.
    """

    learning_rate: float | None = None
    lr_scale: float | None = None
    weight_decay: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "lr_scale", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value} in param_groups: give 0 or more")
        if self.learning_rate is not None and self.lr_scale is not None:
            raise ValueError(
                f"param_groups has learning_rate {self.learning_rate} and lr_scale {self.lr_scale} "
                "for the same parameters: give one of them"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(
                f"layer_decay is {self.layer_decay} in param_groups, expected above 0 and up to 1: "
                "0.65 to 0.9 are usual"
            )


@dataclass(frozen=True)
class _Entry:
    """Trainable parameter with its name, part, position in a tower, and kind."""

    name: str
    parameter: nn.Parameter
    part: str | None
    depth: tuple[int, int] | None
    is_prompt: bool

    def matches(self, pattern: str) -> bool:
        return _matches(pattern, self.name, self.part)

    def decays(self, pattern: str | None, settings: ParamGroup) -> bool:
        is_named = pattern == PROMPT and settings.weight_decay is not None
        return self.parameter.ndim >= 2 and (is_named or not self.is_prompt)


def parse_param_groups(
    groups: Mapping[str, ParamGroup | float | Mapping[str, Any]] | None,
) -> dict[str, ParamGroup]:
    """Return ``param_groups`` with one ``ParamGroup`` for every pattern; a number is a rate."""
    parsed = {}
    for pattern, value in (groups or {}).items():
        if isinstance(value, Mapping):
            value = ParamGroup(**value)
        parsed[pattern] = value if isinstance(value, ParamGroup) else ParamGroup(float(value))
    return parsed


def build_optimizer(
    module: nn.Module,
    make: Callable[[Any], Optimizer],
    settings: Mapping[str, ParamGroup],
    base_names: Iterable[str],
) -> Optimizer:
    """Build an optimizer over the trainable parameters of a module, in named groups.

    Every parameter belongs to one group, that of the first pattern it matches, or "default". Groups
    "<pattern>/no_decay" hold the parameters without weight decay: vectors and scalars (biases,
    norms, the logit scale), prompts and keys. With ``layer_decay`` each depth has its own groups.

    Args:
        module: has ``model`` and an attached ``strategy``.
        make: optimizer as a function of the groups, dicts with "params", "name" and, where they are
            set, "lr" and "weight_decay".
        settings: pattern -> settings. A pattern is the name of a part, or a name of parameters with
            wildcards, as in ``fnmatch``.
        base_names: names of the model's parameters before the strategy was attached.

    Raises:
        ValueError: if a pattern or its setting has no effect, or the optimizer lacks a group.
    """
    found = _parameter_entries(module, frozenset(base_names))
    groups = _named_groups(module, found, settings)
    wanted = [(group["name"], len(group["params"])) for group in groups]
    optimizer = make(groups)
    made = [(group.get("name"), len(group["params"])) for group in optimizer.param_groups]
    if settings and sorted(made, key=str) != sorted(wanted, key=str):
        raise ValueError(
            f"model.optimizer returned {len(made)} groups that are not the {len(wanted)} of "
            "param_groups: pass the groups on to the optimizer as they are, with their names"
        )
    for number, group in enumerate(optimizer.param_groups):
        group.setdefault("name", f"group_{number}")
        if "lr_scale" in group:
            group["lr"] = group["lr"] * group["lr_scale"]
    return optimizer


def _named_groups(
    module: nn.Module, found: Sequence[_Entry], settings: Mapping[str, ParamGroup]
) -> list[dict[str, Any]]:
    rest = [each for each in found if each.parameter.requires_grad]
    trainable, groups = list(rest), []
    for pattern, own in settings.items():
        matched = [each for each in rest if each.matches(pattern)]
        if not matched:
            raise ValueError(_no_match(module, pattern, found, trainable))
        _check_effect(pattern, own, matched)
        rest = [each for each in rest if not each.matches(pattern)]
        groups += _split(pattern, own, matched)
    return groups + _split(None, ParamGroup(), rest)


def _split(pattern: str | None, own: ParamGroup, matched: Sequence[_Entry]) -> list[dict[str, Any]]:
    """Return the groups of one pattern: by depth if its rate decays, with weight decay first."""
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for each in matched:
        label, scale = "", 1.0
        if own.layer_decay is not None and each.depth is not None:
            depth, top = each.depth
            label, scale = f"/layer_{depth:02d}", own.layer_decay ** (top - depth)
        key = (label, not each.decays(pattern, own), scale)
        groups.setdefault(key, []).append(each.parameter)
    made = []
    for (label, is_undecayed, scale), parameters in sorted(groups.items(), key=lambda g: g[0]):
        name = f"{pattern or _DEFAULT}{label}{'/no_decay' if is_undecayed else ''}"
        group: dict[str, Any] = {"params": parameters, "name": name}
        if own.learning_rate is not None:
            group["lr"] = own.learning_rate
        if (factor := scale * (1.0 if own.lr_scale is None else own.lr_scale)) != 1.0:
            group["lr_scale"] = factor
        if is_undecayed:
            group["weight_decay"] = 0.0
        elif own.weight_decay is not None:
            group["weight_decay"] = own.weight_decay
        made.append(group)
    return made


def _parameter_entries(module: Any, base_names: frozenset[str]) -> list[_Entry]:
    model, strategy = module.model, module.strategy
    parts, prompts = _parts(model, strategy, base_names)
    depths = _depths(model, parts) if isinstance(model, nn.Module) else {}
    return [
        _Entry(name, p, parts.get(id(p)), depths.get(id(p)), id(p) in prompts)
        for name, p in module.named_parameters()
    ]


def _parts(
    model: Any, strategy: Strategy, base_names: frozenset[str]
) -> tuple[dict[int, str], set[int]]:
    """Return the part of each parameter by its id, and the ids of prompts and keys."""
    declared = getattr(model, "parts", None)
    named = declared() if callable(declared) else {}
    parts = {id(p): part for part, parameters in named.items() for p in parameters}
    for name, p in model.named_parameters():
        if without_adapters(name) not in base_names:
            parts[id(p)] = ADAPTER
    prompts = set()
    for member in strategy.modules():
        if isinstance(member, Strategy):
            own = member.part or (PROMPT if member.overrides("prompts") else HEAD)
            parts |= {id(p): own for p in member.parameters()}
    for owner in strategy.modules():
        if isinstance(owner, Strategy | nn.ParameterList | nn.ParameterDict):
            free = [id(p) for p in owner.parameters(recurse=False)]
            prompts |= {each for each in free if parts[each] == PROMPT}
    return parts, prompts


def _depths(model: nn.Module, parts: Mapping[int, str]) -> dict[int, tuple[int, int]]:
    """Return each parameter's depth in its tower, 0 to L + 1, and L + 1, by the parameter's id."""
    names = {id(child): name for name, child in model.named_modules()}
    towers: dict[str | None, list[nn.Module]] = {}
    for stack in module_stacks(model):
        own = [parts.get(id(p)) for p in stack[0].parameters()]
        part = next((each for each in own if each != ADAPTER), None)
        towers.setdefault(part, []).extend(stack)
    depths: dict[int, tuple[int, int]] = {}
    order = {id(p): number for number, p in enumerate(model.parameters())}
    for part, blocks in towers.items():
        top = len(blocks) + 1
        inside = {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
        first, start = names[id(blocks[0])].split("."), order[min(inside, key=order.__getitem__)]
        for name, p in model.named_parameters():
            if id(p) in inside:
                depths[id(p)] = inside[id(p)], top
            elif parts.get(id(p)) == part:
                is_before = order[id(p)] < start
                depths[id(p)] = 0 if _is_input(name.split("."), first, is_before) else top, top
    return depths


def _is_input(name: Sequence[str], block: Sequence[str], is_before: bool) -> bool:
    """Return whether a parameter outside of the blocks comes before them in the forward pass.

    Embeddings are known by name. Other modules are registered in the order of the forward pass, but
    parameters beside them, such as a projection, always first.
    """
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(name, block, strict=False))))
    own = name[shared:]
    return bool(_INPUT.search(".".join(own))) or (is_before and len(own) > 1)


def _matches(pattern: str, name: str, part: str | None) -> bool:
    inner = name.partition(".")[2]
    return pattern == part or fnmatchcase(name, pattern) or fnmatchcase(inner, pattern)


def _check_effect(pattern: str, own: ParamGroup, matched: Sequence[_Entry]) -> None:
    if own.weight_decay and not any(each.decays(pattern, own) for each in matched):
        raise ValueError(
            f"param_groups gives '{pattern}' weight_decay {own.weight_decay}, and its "
            f"{len(matched)} parameters have none: they are vectors (biases, norms), or prompts "
            "and keys, whose entry is 'prompt'"
        )
    if own.layer_decay is not None and not any(each.depth for each in matched):
        raise ValueError(
            f"param_groups gives '{pattern}' layer_decay {own.layer_decay}, and none of its "
            f"{len(matched)} parameters is in a tower with blocks: leave layer_decay out"
        )


def _no_match(
    module: Any, pattern: str, found: Sequence[_Entry], trainable: Sequence[_Entry]
) -> str:
    """Return the message for a pattern that matches no trainable parameter that is left."""
    start = f"param_groups has '{pattern}', which matches none of the "
    if any(each.matches(pattern) for each in trainable):
        return f"{start}parameters that the entries before it leave over: put it before them"
    counts: dict[str, int] = {}
    for each in trainable:
        if each.part is not None:
            counts[each.part] = counts.get(each.part, 0) + 1
    parts = ", ".join(f"{part} ({count})" for part, count in sorted(counts.items()))
    frozen = sum(each.matches(pattern) for each in found)
    if frozen:
        why = f"its {frozen} parameters are frozen, so train them or leave the entry out"
    else:
        names = [each.name for each in trainable]
        near = get_close_matches(pattern, [*counts, *names], n=3, cutoff=0.5)
        near = near or names[:2]
        why = f"near names are {', '.join(near) or 'none'}"
        if not callable(getattr(module.model, "parts", None)):
            why += f"; {type(module.model).__name__} has no method parts() that names its towers"
    return (
        f"{start}{len(trainable)} trainable parameters: {why}. Trainable parts: {parts or 'none'}"
    )
