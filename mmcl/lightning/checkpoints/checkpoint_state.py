"""State of a checkpoint: its weights, the base model they belong to, optimizer state by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcl.core.strategy import TASK_PROGRESS

REPLICATED, NAMES = "replicated", "names"
"""Keys of a mid-task checkpoint: state that is never sharded, and the names of all its entries."""


def check_state(module: Any, checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this model and strategy.

    Raises:
        ValueError: naming the first keys that differ, or the fingerprints.
    """
    expected = set(module.trainable_state_dict())
    found = set(checkpoint.get(NAMES) or checkpoint["state_dict"])
    for keys, problem in ((expected - found, "lacks"), (found - expected, "has unknown")):
        # A strategy states its task once one has begun; earlier versions did not.
        keys = {key for key in keys if not key.endswith(f".{TASK_PROGRESS}")}
        if keys:
            named = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"the checkpoint {problem} {len(keys)} weights ({named} ...): it was written by "
                "another model, strategy or set of trainable weights; use the run's own config"
            )
    fingerprint = module.fingerprint()
    if checkpoint.get("fingerprint", fingerprint) != fingerprint:
        raise ValueError(
            f"the checkpoint was trained on frozen weights {checkpoint['fingerprint'][:12]}, and "
            f"this model has {fingerprint[:12]}: load the same pretrained weights and settings, or "
            "move the adapter to this base: mmcl upgrade check RUN@task --to BASE says whether it "
            "fits, mmcl recycle moves it"
        )


def split_checkpoint(checkpoint: dict[str, Any], module: Any) -> None:
    """Split a mid-task checkpoint into weights and replicated state, with optimizer state by name.

    Lightning loads the weights under any parallelism, but other state, such as a strategy's buffer,
    only if the weights are not sharded: that state is stored separately. The optimizer's state is
    keyed by parameter name, because parameter indices differ between sharded and unsharded runs.
    """
    trainable, state = module.trainable_state_dict(), checkpoint["state_dict"]
    weights = {name for name, _ in module.named_parameters()}
    checkpoint[NAMES] = sorted(trainable)
    if module.fsdp is None:
        checkpoint[REPLICATED] = {name: v for name, v in trainable.items() if name not in weights}
        checkpoint["state_dict"] = {name: v for name, v in state.items() if name in weights}
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        names = [
            [name_of.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
            for optimizer in module.trainer.optimizers
        ]
    else:
        checkpoint[REPLICATED] = module.fsdp.replicated_state()
        # If Lightning uses indices instead of names, they follow this order.
        names = [[name for name, _ in module.named_parameters()]] * len(module.trainer.optimizers)
    checkpoint["optimizer_states"] = [
        _key_by_name(state, own_names)
        for state, own_names in zip(checkpoint["optimizer_states"], names, strict=True)
    ]


def _key_by_name(state: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return an optimizer's state keyed by parameter names instead of indices.

    Args:
        state: state of one optimizer; {} on ranks other than 0 of an unsharded checkpoint.
        names: parameter name of every index, "" = unknown.
    """
    groups = state.get("param_groups", [])
    keys = [key for group in groups for key in group["params"]]
    has_indices = all(isinstance(key, int) and key < len(names) for key in keys)
    if not keys or (has_indices and "" in names):
        return state
    name_of = {key: names[key] if has_indices else key for key in keys}
    return {
        **state,
        "state": {name_of[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[k] for k in group["params"]]} for group in groups
        ],
    }
