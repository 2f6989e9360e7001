"""Content of a mid-task checkpoint: sharded or unsharded weights, replicated state, loop progress.

Lightning loads the weights under any parallelism, but other state, such as a strategy's buffer,
only if the weights are not sharded: that state is stored separately. The optimizer's state is keyed
by parameter name, because parameter indices differ between sharded and unsharded runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BESIDE, NAMES = "replicated", "names"


def split_checkpoint(checkpoint: dict[str, Any], module: Any) -> None:
    """Split a checkpoint into trainable weights and replicated state, with optimizer state by name.

    Args:
        checkpoint: Lightning's checkpoint without frozen weights; modified in place.
        module: a ContinualModule with a trainer; its weights may be sharded.
    """
    trainable, state = module.trainable_state_dict(), checkpoint["state_dict"]
    weights = {name for name, _ in module.named_parameters()}
    checkpoint[NAMES] = sorted(trainable)
    if module.fsdp is None:
        checkpoint[BESIDE] = {name: v for name, v in trainable.items() if name not in weights}
        checkpoint["state_dict"] = {name: v for name, v in state.items() if name in weights}
        names = [_parameter_names(module, optimizer) for optimizer in module.trainer.optimizers]
    else:
        checkpoint[BESIDE] = module.fsdp.replicated_state()
        # If Lightning uses indices instead of names, they follow this order.
        names = [[name for name, _ in module.named_parameters()]] * len(module.trainer.optimizers)
    checkpoint["optimizer_states"] = [
        _key_by_name(state, own_names)
        for state, own_names in zip(checkpoint["optimizer_states"], names, strict=True)
    ]


def merge_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Merge the replicated state into the weights, unless Lightning has already loaded these.

    Args:
        checkpoint: modified in place.

    Returns:
        the state that the module must load itself.
    """
    replicated: dict[str, Any] = checkpoint.pop(BESIDE, {})
    if "state_dict" not in checkpoint:
        return replicated
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **replicated}
    return {}


def checkpoint_names(checkpoint: Mapping[str, Any]) -> Sequence[str]:
    """Return the names of all entries of a module's state in a checkpoint."""
    names: Sequence[str] = checkpoint.get(NAMES) or list(checkpoint["state_dict"])
    return names


def _parameter_names(module: Any, optimizer: Any) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = optimizer.param_groups
    return [names.get(id(p), "") for group in groups for p in group["params"]]


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


def set_loop_progress(
    loops: dict[str, Any], *, done: int, an_epoch: int, accumulation: int
) -> None:
    """Set a checkpoint's loop progress to that of an uninterrupted run.

    A run resumed at the end of an epoch counts that epoch as not started (Lightning 2.6), and a
    checkpoint of its next epoch cannot be resumed: batches would be trained on twice.

    Args:
        loops: ``checkpoint["loops"]["fit_loop"]``, of a checkpoint written in
            ``on_train_batch_end``; modified in place.
        done: finished batches of this fit, including the current one.
        an_epoch: batches per epoch.
        accumulation: batches per optimizer step.
    """
    epochs = (done - 1) // an_epoch
    in_epoch = done - epochs * an_epoch
    progress = loops["epoch_loop.batch_progress"]
    for name, count in (("total", done), ("current", in_epoch)):
        progress[name].update(ready=count, started=count, processed=count, completed=count - 1)
    progress["is_last_batch"] = in_epoch == an_epoch
    for counts in loops["epoch_progress"].values():
        counts.update(ready=epochs + 1, started=epochs + 1, processed=epochs, completed=epochs)
    steps = in_epoch // accumulation
    for counts in loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"].values():
        counts["current"].update({name: steps for name in counts["current"]})
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = done // accumulation - 1
