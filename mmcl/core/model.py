"""The VLM protocol: what the rest of mmcl asks of a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter

from mmcl.core.batch import Batch
from mmcl.core.output import NO_PROMPTS, Output, Prompts

_SIGNATURES = {
    "embed": "embed(batch, modality) -> (B, D)",
    "encode": "encode(batch) -> (B, N, D)",
    "widths": "widths: {modality: token width}",
    "freeze": "freeze(*towers)",
    "fingerprint": "fingerprint() -> str",
    "answer": "answer(batch, prompts, refine, candidates, max_new_tokens) -> list of B texts",
    "linears": "linears(which) -> {name: nn.Linear of the language model}",
    "gates": "gates: {name: (B, E) weights of installed experts}",
}


@runtime_checkable
class VLM(Protocol):
    """A vision-language model; a foreign model needs these three and imports nothing of mmcl.

    Some strategies ask for more and say so (``require``): ``widths`` (modality -> token width
    where prompts enter), ``embed(batch, modality)`` -> (B, D) unprompted embedding without
    gradient, ``encode(batch)`` -> (B, N, D) output of the frozen vision tower,
    ``freeze(*towers)``, ``fingerprint()`` (hash of the frozen weights). A model that generates has
    ``answer(batch, prompts, refine=None, candidates=(), max_new_tokens=64)`` -> B texts,
    ``linears(which)`` -> linear layers of its language model by name, and ``gates``, a dict that it
    fills from ``prompts.gates`` at the entry of every forward pass for installed experts to read.
    """

    def __call__(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Run a forward pass over the rows of a batch."""
        ...

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the scalar task loss, a mean over scored rows."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Iterate over names and parameters, as torch modules do."""
        ...


def require(model: object, *members: str, by: object) -> Any:
    """Return the model, after checking that it can do what a strategy asks.

    Args:
        model: any model.
        members: names of optional VLM members, for example "embed".
        by: the strategy that asks; its class name goes into the error.

    Raises:
        TypeError: naming every missing member with its signature.
    """
    missing = [_SIGNATURES.get(name, name) for name in members if not hasattr(model, name)]
    if missing:
        raise TypeError(
            f"{type(by).__name__} needs model.{' and model.'.join(missing)}, and "
            f"{type(model).__name__} has none: wrap it in mmcl.models or add the method"
        )
    return model


def answers_in_words(model: object) -> bool:
    """Tell whether a model says what it wants; one that compares given classes does not."""
    return hasattr(model, "answer") and not hasattr(model, "set_classes")


def require_classes(model: object, *, by: object, instead: str) -> None:
    """Check that a model gives class scores, which a strategy lives on.

    Args:
        model: any model.
        by: the strategy that asks; its class name goes into the error.
        instead: strategies to use with a model that answers in words.

    Raises:
        TypeError: if the model answers.
    """
    if answers_in_words(model):
        raise TypeError(
            f"{type(by).__name__} needs class scores, and {type(model).__name__} answers in words: "
            f"use {instead}, or a model that classifies such as mmcl.models.OpenCLIP"
        )


def expect_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Check a tensor's shape at a public door.

    Args:
        name: the argument as the user typed it.
        tensor: what was given.
        shape: wanted sizes, None = any.

    Raises:
        ValueError: if the number of dimensions or any size differs.
    """
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, given, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {given}, expected ({wanted}): check what made it")
