"""The parts of an image-text-to-text model: what learns, what is adapted, what it all is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmcl.models.families import Family

Part = Literal["image", "text", "projector"]
Kind = Literal["all", "attention", "mlp"]
_ENDS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def parameters_of(lm: Any, family: Family, part: Part) -> list[nn.Parameter]:
    """Return the parameters of one part; together the parts are the whole model, each once.

    Args:
        lm: of transformers.
        family: what is known of its type.
        part: "image", the vision tower; "text", the language model with its head; "projector", all
            that lies between, such as LLaVA-OneVision's newline.

    Raises:
        ValueError: if there is no such part.
    """
    inner = lm.model
    between = {id(p) for p in inner.get_submodule(family.projector).parameters()}
    image = {id(p) for p in inner.get_submodule(family.tower).parameters()} - between
    language = [inner.get_submodule(family.language), lm.get_output_embeddings()]
    text = {id(p) for module in language for p in module.parameters()}
    known = {"image": image, "text": text, "projector": None}
    if part not in known:
        raise ValueError(f"there is no part {part!r}: known are 'image', 'projector' and 'text'")
    own = known[part]
    if own is None:
        return [p for p in lm.parameters() if id(p) not in image | text]
    return [p for p in lm.parameters() if id(p) in own]


def linears_of(model: nn.Module, prefix: str, which: Kind) -> dict[str, nn.Linear]:
    """Return the linear layers under a prefix by their full name.

    Args:
        model: whose names are given.
        prefix: of the language model, with a dot at its end.
        which: "all", those of "attention" (q, k, v, o) or of the "mlp" (gate, up, down).

    Raises:
        ValueError: if ``which`` is another.
    """
    if which != "all" and which not in _ENDS:
        raise ValueError(f"layers is {which!r}, expected 'all', 'attention' or 'mlp'")
    ends = None if which == "all" else _ENDS[which]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(prefix)
        if ends is None or name.rpartition(".")[2] in ends
    }


Place = tuple[nn.Module, str]
"""A module and the name of one of its own parameters."""


def places_of(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[Place]:
    """Return where parameters are, as the objects themselves give way where weights are sharded.

    Args:
        module: that they lie in, at any depth.
        parameters: any of its.
    """
    wanted = {id(parameter) for parameter in parameters}
    owned = [(part, name, p) for part in module.modules() for name, p in part._parameters.items()]
    return [(part, name) for part, name, parameter in owned if id(parameter) in wanted]


def touching(logits: Tensor, *parts: Iterable[Place]) -> Tensor:
    """Return the logits with a graph to all parameters that learn, whatever had part in them.

    The end of a learning tower has none, behind the layer whose features are taken, and a batch
    without pictures leaves tower and projector out. Processes wait for each other's gradients of
    every parameter, and would wait for these for ever.

    Args:
        logits: of a forward pass.
        parts: where parameters are, see ``places_of``.
    """
    held = [module._parameters[name] for part in parts for module, name in part]
    learning = [
        parameter for parameter in held if parameter is not None and parameter.requires_grad
    ]
    if not learning or not torch.is_grad_enabled():
        return logits
    return logits + (torch.stack([p.flatten()[0] for p in learning]).sum() * 0).to(logits.dtype)
