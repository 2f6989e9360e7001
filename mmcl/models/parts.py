"""The parts of an image-text-to-text model: what learns, what is adapted, what it all is."""

from __future__ import annotations

import hashlib
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


class Fingerprint:
    """Hashes weights once for as long as they stay what and where they are."""

    def __init__(self) -> None:
        self._seen: tuple[object, str] = ((), "")

    def of(self, facts: str, named: Iterable[tuple[str, Tensor]]) -> str:
        """Return the sha256 of facts and of tensors with their names, types and sizes."""
        tensors = dict(named)
        places = [(name, t.data_ptr(), t._version) for name, t in tensors.items()]
        key = (facts, tuple(places))
        if self._seen[0] != key:
            digest = hashlib.sha256(facts.encode())
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                plain = tensor.detach().cpu().contiguous()
                digest.update(plain.view(-1).view(torch.uint8).numpy())
            self._seen = (key, digest.hexdigest())
        return self._seen[1]
