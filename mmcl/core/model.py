"""VLM: the protocol of a vision-language model, and checks of its optional members."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import Parameter

from mmcl.core.batch import Batch
from mmcl.core.output import NO_PROMPTS, Output, Prompts

_SIGNATURES = {
    "embed": "embed(batch, modality) -> (B, D)",
    "encode_image": "encode_image(batch) -> (B, N, D)",
    "prompt_dims": "prompt_dims: {modality: token dim}",
    "freeze": "freeze(*towers)",
    "fingerprint": "fingerprint() -> str",
    "generate": "generate(batch, prompts, transform_output, candidates, max_new_tokens) -> B texts",
    "target_linears": "target_linears(target_modules) -> {name: nn.Linear of the language model}",
    "gates": "gates: {name: (B, E) weights of injected experts}",
}


@runtime_checkable
class VLM(Protocol):
    """Protocol of a vision-language model: three members; a model imports nothing of mmcl.

    Optional members, which some strategies need (they check with ``require``):

    * ``embed(batch, modality)`` -> (B, D) embedding of each sample, without prompts or gradient.
    * ``encode_image(batch)`` -> (B, N, D) output tokens of the frozen vision tower.
    * ``prompt_dims``: modality -> dim of the tokens of the tower that prompts enter.
    * ``freeze(*towers)`` turns off the gradients of whole towers.
    * ``fingerprint()`` -> str, a hash of the frozen weights.

    Members of a generative model:

    * ``answer(batch, prompts, transform_output=None, candidates=(), max_new_tokens=64)`` -> B
      texts.
    * ``target_linears(target_modules)`` -> the linear layers of its language model, by name.
    * ``gates``: a dict that the model fills from ``prompts.gates`` at the start of every forward
      pass; injected experts read it.
    """

    def __call__(self, batch: Batch, prompts: Prompts = NO_PROMPTS) -> Output:
        """Run a forward pass over a batch.

        Args:
            batch: samples on the model's device.
            prompts: prompt tokens and expert gates of this pass.
        """
        ...

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Return the task loss, a scalar: the mean over the samples (or tokens) in the loss."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Iterate over parameters by name, as torch modules do."""
        ...


def require(model: object, *members: str, by: object) -> Any:
    """Check that a model has the optional members that a strategy needs, and return the model.

    Args:
        model: any model.
        members: names of optional VLM members, for example "embed".
        by: the strategy; its class name goes into the error.

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


def is_generative_model(model: object) -> bool:
    """Whether a model is generative: it answers with free text, not with class scores."""
    return hasattr(model, "generate") and not hasattr(model, "set_classes")


def require_classes(model: object, *, by: object, instead: str) -> None:
    """Check that a model gives class scores, which a strategy needs.

    Args:
        model: any model.
        by: the strategy; its class name goes into the error.
        instead: strategies to use with a generative model; they go into the error.

    Raises:
        TypeError: if the model is generative.
    """
    if is_generative_model(model):
        raise TypeError(
            f"{type(by).__name__} needs class scores, and {type(model).__name__} generates text: "
            f"use {instead}, or a model that classifies such as mmcl.models.OpenCLIP"
        )


def expect_shape(name: str, tensor: Tensor, *shape: int | None) -> None:
    """Check the shape of a tensor that a user passes in.

    Args:
        name: the argument's name as the user typed it.
        tensor: its value.
        shape: expected size of each dimension, None = any.

    Raises:
        ValueError: if the number of dimensions or any size differs.
    """
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        want is None or want == got for want, got in zip(shape, given, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {given}, expected ({wanted}): check where it is made")


BASE_LAYER_NAMES = ("base", "base_layer")
"""Attributes that hold the adapted layer: in the adapters of ``mmcl.layers`` and of peft."""


def without_adapters(name: str) -> str:
    """Return the name that a parameter or buffer has in the model without adapters."""
    for attribute in BASE_LAYER_NAMES:
        name = name.replace(f".{attribute}.", ".")
    return name


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; afterwards restore every submodule's mode.

    Args:
        model: model whose submodules may be in different modes.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
