"""Module groups of an image-text-to-text model: vision tower, projector and language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.models.hf_vlm.architectures import Architecture

ModuleGroup = Literal["image", "text", "projector"]
TargetModules = Literal["all", "attention", "mlp"]
_SUFFIXES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def parameters_of(lm: Any, architecture: Architecture, group: ModuleGroup) -> list[nn.Parameter]:
    """Return the parameters of one module group; every parameter belongs to exactly one group.

    Args:
        lm: model of transformers.
        architecture: architecture of its type.
        group: "image", the vision tower; "text", the language model with its head; "projector",
            everything else, such as LLaVA-OneVision's newline.

    Raises:
        ValueError: if there is no such group.
    """
    inner = lm.model
    projector = {id(p) for p in inner.get_submodule(architecture.projector).parameters()}
    image = {id(p) for p in inner.get_submodule(architecture.tower).parameters()} - projector
    language = [inner.get_submodule(architecture.language), lm.get_output_embeddings()]
    text = {id(p) for module in language for p in module.parameters()}
    groups = {"image": image, "text": text, "projector": None}
    if group not in groups:
        raise ValueError(
            f"there is no module group {group!r}: choose 'image', 'projector' or 'text'"
        )
    wanted = groups[group]
    if wanted is None:
        return [p for p in lm.parameters() if id(p) not in image | text]
    return [p for p in lm.parameters() if id(p) in wanted]


def find_linears(model: nn.Module, prefix: str, which: TargetModules) -> dict[str, nn.Linear]:
    """Return the linear layers under a prefix by their full name.

    Args:
        model: module whose names are returned.
        prefix: name of the language model, with a dot at its end.
        which: "all", "attention" (q, k, v, o) or "mlp" (gate, up, down).

    Raises:
        ValueError: if ``which`` is another.
    """
    if which != "all" and which not in _SUFFIXES:
        raise ValueError(f"target_modules is {which!r}, expected 'all', 'attention' or 'mlp'")
    suffixes = None if which == "all" else _SUFFIXES[which]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
        if suffixes is None or name.rpartition(".")[2] in suffixes
    }


ParameterLocation = tuple[nn.Module, str]
"""Location of a parameter: a module and the name of one of its own parameters."""


def parameter_locations(
    module: nn.Module, parameters: Iterable[nn.Parameter]
) -> list[ParameterLocation]:
    """Return the locations of parameters, which stay valid when FSDP replaces the parameters.

    Args:
        module: contains the parameters, at any depth.
        parameters: any of its parameters.
    """
    wanted = {id(parameter) for parameter in parameters}
    owned = [
        (child, name, p) for child in module.modules() for name, p in child._parameters.items()
    ]
    return [(child, name) for child, name, parameter in owned if id(parameter) in wanted]


def touch_parameters(logits: Tensor, *groups: Iterable[ParameterLocation]) -> Tensor:
    """Add ``0 * p`` for every trainable parameter p, so that each gets a gradient.

    DDP waits for the gradients of all of them. A batch without images would leave out tower and
    projector, and every batch leaves out the tower's layers after the one whose features are used.

    Args:
        logits: of a forward pass.
        groups: locations of parameters, see ``parameter_locations``.
    """
    parameters = [module._parameters[name] for group in groups for module, name in group]
    trainable = [p for p in parameters if p is not None and p.requires_grad]
    if not trainable or not torch.is_grad_enabled():
        return logits
    return logits + (torch.stack([p.flatten()[0] for p in trainable]).sum() * 0).to(logits.dtype)
