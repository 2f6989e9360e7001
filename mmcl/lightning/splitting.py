"""A checkpoint inside of a task in two parts: weights, which may be in shards, and all beside them.

Lightning loads the weights under any way of using devices, and a strategy's own state only where
weights are not shared out. The optimiser's state goes by the names of weights, for their numbers
differ from one way to another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BESIDE, NAMES = "beside", "names"


def split(checkpoint: dict[str, Any], module: Any) -> None:
    """Part what learns and its optimiser's state from the rest of a checkpoint.

    Args:
        checkpoint: as Lightning collected it, without frozen weights; changed.
        module: a ContinualModule with a trainer; its weights may be shared out.
    """
    kept, state = module.kept_state(), checkpoint["state_dict"]
    weights = {name for name, _ in module.named_parameters()}
    checkpoint[NAMES] = sorted(kept)
    if module.shards is None:
        checkpoint[BESIDE] = {name: value for name, value in kept.items() if name not in weights}
        checkpoint["state_dict"] = {name: v for name, v in state.items() if name in weights}
        names = [_names(module, optimizer) for optimizer in module.trainer.optimizers]
    else:
        checkpoint[BESIDE] = module.shards.beside()
        # Lightning numbers them in this order, when it numbers them at all.
        names = [[name for name, _ in module.named_parameters()]] * len(module.trainer.optimizers)
    checkpoint["optimizer_states"] = [
        _by_name(state, own)
        for state, own in zip(checkpoint["optimizer_states"], names, strict=True)
    ]


def merged(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Put the two parts together where Lightning has not loaded the weights yet.

    Args:
        checkpoint: changed.

    Returns:
        what is left for the module to load itself.
    """
    beside: dict[str, Any] = checkpoint.pop(BESIDE, {})
    if "state_dict" not in checkpoint:
        return beside
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **beside}
    return {}


def names_in(checkpoint: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of everything that a checkpoint holds of a module."""
    names: Sequence[str] = checkpoint.get(NAMES) or list(checkpoint["state_dict"])
    return names


def _names(module: Any, optimizer: Any) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = optimizer.param_groups
    return [names.get(id(p), "") for group in groups for p in group["params"]]


def _by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an optimiser's state with names where it has numbers.

    Args:
        state: of one optimiser; {} on ranks that leave it to rank 0.
        names: of the weight of every number, "" = of none that we know.
    """
    groups = state.get("param_groups", [])
    keys = [key for group in groups for key in group["params"]]
    is_numbered = all(isinstance(key, int) and key < len(names) for key in keys)
    if not keys or (is_numbered and "" in names):
        return state
    told = {key: names[key] if is_numbered else key for key in keys}
    return {
        **state,
        "state": {told[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [told[k] for k in group["params"]]} for group in groups
        ],
    }
