"""Merging of checkpoints of runs: full weights, with adapters as the products B A that they add.

A file of its own because it reads models and writes exports, and the formulas are pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmcl.core import write_atomic
from mmcl.core.model import without_adapters
from mmcl.export.formats import (
    CLIP_WEIGHTS,
    beyond_weights,
    example_batch,
    new_folder,
    plain_weights,
    strategies_of,
    write_clip,
)
from mmcl.layers.adapters import adapter_layers
from mmcl.lightning.module import ContinualModule
from mmcl.models.hf_vlm.loading import plain_model, save_pretrained
from mmcl.ops import model_merging as merging

METHODS = ("average", "ema", "wise", "task_arithmetic", "ties", "dare", "magmax", "fisher")
FROM_BASE = ("task_arithmetic", "ties", "dare", "magmax")
"""Methods that merge differences to a base."""


@dataclass(frozen=True)
class LoadedWeights:
    """Plain weights of a checkpoint.

    Attributes:
        name: of the checkpoint, as the user gave it.
        weights: name -> tensor, adapters merged into the weights that they adapt.
        fingerprint: of the frozen weights if there are adapters, else "".
        buffers: names of the weights that are not trained, such as running statistics.
    """

    name: str
    weights: dict[str, Tensor]
    fingerprint: str
    buffers: frozenset[str] = frozenset()


def load_weights(module: ContinualModule, name: str) -> LoadedWeights:
    """Copy the plain weights of a module.

    Raises:
        ValueError: if predictions depend on more than weights, or weights are quantized.
        TypeError: if the model is neither of open_clip nor of transformers.
    """
    model = cast(Any, module.model)
    adapted = bool(adapter_layers(cast(nn.Module, model)))
    clip = getattr(model, "clip", None)
    if clip is None:
        reason = beyond_weights(module, example_batch(module))
        weights = {} if reason else plain_weights(module)
    else:
        beyond = [
            type(each).__name__
            for each in strategies_of(module.strategy)
            if each.overrides("prompts") or each.overrides("transform_output")
        ]
        reason = f"has more than weights ({', '.join(beyond)})" if beyond else ""
        reason = reason or ("has adapters inside a CLIP" if adapted else "")
        weights = clip.state_dict()
    if reason:
        raise ValueError(
            f"{name} {reason}, which a merge of weights would lose: merge runs of strategies that "
            "change weights alone, such as Finetune or LoRA"
        )
    copies = {key: tensor.detach().cpu().clone() for key, tensor in weights.items()}
    owner = model.lm if clip is None else clip
    buffers = {without_adapters(key) for key, _ in owner.named_buffers(remove_duplicate=False)}
    fingerprint = module.fingerprint() if adapted else ""
    return LoadedWeights(name, copies, fingerprint, frozenset(buffers & copies.keys()))


def export_file(text: str) -> Path | None:
    """Return the weights of an export of a CLIP, a folder or .safetensors file; None if it is none.

    Args:
        text: checkpoint, as the user gave it.
    """
    path = Path(text)
    file = path if path.suffix == ".safetensors" else path / CLIP_WEIGHTS
    return file if file.is_file() else None


def replace_clip_weights(module: ContinualModule, file: Path) -> None:
    """Replace the weights of a CLIP by those of an export; float16 ones are widened.

    Args:
        module: with a CLIP.
        file: from ``export_file``.

    Raises:
        TypeError: if the model is not one of open_clip.
        ValueError: naming the first weight that is missing, unknown or of another shape.
    """
    clip = getattr(module.model, "clip", None)
    if clip is None:
        raise TypeError(
            f"{file} is an export of a CLIP, and --like has a {type(module.model).__name__}: give "
            "a run of the same CLIP"
        )
    weights, own = load_file(file), clip.state_dict()
    problems = [f"lacks '{name}'" for name in own if name not in weights]
    problems += [f"has '{name}', which the model lacks" for name in weights if name not in own]
    problems += [
        f"has '{name}' of shape {tuple(tensor.shape)}, the model of {tuple(own[name].shape)}"
        for name, tensor in weights.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"{file} {problems[0]} ({len(problems)} weights differ): give --like with a run of the "
            "same model"
        )
    clip.load_state_dict(weights)


def expect_mergeable(loaded: Sequence[LoadedWeights]) -> None:
    """Check that checkpoints have the same weights, and adapters the same base.

    Raises:
        ValueError: naming the first difference.
    """
    first = loaded[0]
    for other in loaded[1:]:
        try:
            merging.expect_same_weights([first.weights, other.weights])
        except ValueError as error:
            raise ValueError(f"{first.name} (1) and {other.name} (2): {error}") from None
    adapted = [each for each in loaded if each.fingerprint]
    for other in adapted[1:]:
        if other.fingerprint != adapted[0].fingerprint:
            raise ValueError(
                f"the adapters of {adapted[0].name} and {other.name} were trained on other frozen "
                f"weights ({adapted[0].fingerprint[:12]}, {other.fingerprint[:12]}): merge "
                "adapters of one base"
            )


def merge_weights(
    method: str,
    loaded: Sequence[LoadedWeights],
    base: LoadedWeights | None,
    arguments: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Merge plain weights by a formula of ``mmcl.ops.model_merging``, buffers by their mean.

    A formula of task vectors may move a variance below 0, so buffers take no part in it: they are
    averaged over the checkpoints, without the base, with the shares of "average", "ema" or "wise".

    Args:
        method: one of ``METHODS``.
        loaded: checkpoints in their order.
        base: of the methods in ``FROM_BASE``, else None.
        arguments: keyword arguments of the formula.

    Raises:
        ValueError: if the weights do not fit together, or an argument is out of range.
    """
    expect_mergeable([*([] if base is None else [base]), *loaded])
    names = loaded[0].buffers
    sets = [_without(each.weights, names) for each in loaded]
    formula = getattr(merging, method)
    if base is not None:
        merged = formula(_without(base.weights, names), sets, **arguments)
    elif method == "wise":
        if len(sets) != 2:
            raise ValueError(f"wise is a line between two checkpoints, got {len(sets)}: give two")
        merged = merging.wise(sets[0], sets[1], **arguments)
    else:
        merged = formula(sets, **arguments)
    buffers = [{name: each.weights[name] for name in names} for each in loaded]
    merged |= _average_buffers(buffers, _buffer_shares(method, len(loaded), arguments))
    return {name: merged[name] for name in loaded[0].weights}


def _without(weights: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name not in names}


def _buffer_shares(method: str, count: int, arguments: Mapping[str, Any]) -> Sequence[float] | None:
    """Return the share of each checkpoint in the mean of the buffers, None = equal ones."""
    if method == "wise":
        return [1 - arguments["alpha"], arguments["alpha"]]
    if method == "ema":
        share = arguments["share"]
        newer = [share * (1 - share) ** (count - 1 - index) for index in range(1, count)]
        return [(1 - share) ** (count - 1), *newer]
    return cast("Sequence[float] | None", arguments.get("shares"))


def _average_buffers(
    buffers: Sequence[Mapping[str, Tensor]], shares: Sequence[float] | None
) -> dict[str, Tensor]:
    """Return the weighted mean of buffers; integers are rounded, bools are those of the last."""

    def is_integer(tensor: Tensor) -> bool:
        return not (tensor.is_floating_point() or tensor.dtype == torch.bool)

    wide = [{n: t.double() if is_integer(t) else t for n, t in each.items()} for each in buffers]
    mean = merging.average(wide, shares)
    return {
        name: mean[name].round().to(tensor.dtype) if is_integer(tensor) else mean[name]
        for name, tensor in buffers[0].items()
    }


@torch.no_grad()
def write_merged(
    module: ContinualModule, weights: Mapping[str, Tensor], target: Path, facts: Mapping[str, Any]
) -> str:
    """Write merged weights as an export of the model, with ``merge.json``.

    Args:
        module: of any of the merged checkpoints; a CLIP's weights are replaced.
        weights: plain weights.
        target: new folder, or of a CLIP a new .safetensors file.
        facts: inputs, method and arguments, written as JSON: ``merge.json`` in the folder, or
            beside the file as ``<name>.merge.json``.

    Returns:
        A report: target and format.

    Raises:
        ValueError: if the target exists.
    """
    model = cast(Any, module.model)
    text = json.dumps(facts, indent=2) + "\n"
    if getattr(model, "clip", None) is not None:
        model.clip.load_state_dict(weights)
        report = write_clip(module, target, half=False)
    else:
        plain = plain_model(model.lm, weights)
        with new_folder(target) as temporary:
            save_pretrained(plain, model.processor, temporary)
        report = f"{target}: a transformers model with its processor"
    is_folder = target.is_dir()
    write_atomic(target / "merge.json" if is_folder else target.with_suffix(".merge.json"), text)
    return report
