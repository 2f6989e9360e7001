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
from torch import Tensor, nn

from mmcl.core import write_atomic
from mmcl.export.formats import (
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

METHODS = ("average", "ema", "wise", "task_arithmetic", "ties", "dare", "magmax")
FROM_BASE = ("task_arithmetic", "ties", "dare", "magmax")
"""Methods that merge differences to a base."""


@dataclass(frozen=True)
class LoadedWeights:
    """Plain weights of a checkpoint.

    Attributes:
        name: of the checkpoint, as the user gave it.
        weights: name -> tensor, adapters merged into the weights that they adapt.
        fingerprint: of the frozen weights if there are adapters, else "".
    """

    name: str
    weights: dict[str, Tensor]
    fingerprint: str


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
    return LoadedWeights(name, copies, module.fingerprint() if adapted else "")


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
    """Merge plain weights by a formula of ``mmcl.ops.model_merging``.

    Args:
        method: one of ``METHODS``.
        loaded: checkpoints in their order.
        base: of the methods in ``FROM_BASE``, else None.
        arguments: keyword arguments of the formula.

    Raises:
        ValueError: if the weights do not fit together, or an argument is out of range.
    """
    expect_mergeable([*([] if base is None else [base]), *loaded])
    sets = [each.weights for each in loaded]
    formula = getattr(merging, method)
    if base is not None:
        return cast("dict[str, Tensor]", formula(base.weights, sets, **arguments))
    if method == "wise":
        if len(sets) != 2:
            raise ValueError(f"wise is a line between two checkpoints, got {len(sets)}: give two")
        return merging.wise(sets[0], sets[1], **arguments)
    return cast("dict[str, Tensor]", formula(sets, **arguments))


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
