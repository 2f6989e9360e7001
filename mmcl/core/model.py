"""VLM: the protocol of a vision-language model, its prompts and output; checks of its members."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from mmcl.core.batch import Batch

Modality = Literal["image", "text"]
PromptPosition = tuple[Modality, int]
"""Position of prompt tokens: a tower and one of its layers; layer 0 is the tower's input."""


@dataclass(frozen=True)
class Prompts:
    """Prompt tokens and expert gates of a forward pass. B samples, P prompt tokens, D tower dim.

    Attributes:
        tokens: (tower, layer) -> (B, P, D) prompt tokens of each sample.
        aux: auxiliary tensors for ``penalty``, for example "match" (B, top_k).
        gates: name of injected experts -> (B, E) weight of each of E experts for each sample.
    """

    tokens: Mapping[PromptPosition, Tensor] = field(default_factory=dict)
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def is_given(self) -> bool:
        """Whether there is any prompt token, auxiliary tensor or gate."""
        return bool(self.tokens or self.aux or self.gates)

    def merge(self, other: Prompts) -> Prompts:
        """Return the union of two strategies' prompts.

        Raises:
            ValueError: if both use the same position, or the same name of a note or gate.
        """
        if not other.is_given:
            return self
        for what, mine, theirs in (
            ("prompt", self.tokens, other.tokens),
            ("note", self.aux, other.aux),
            ("gate", self.gates, other.gates),
        ):
            clash = sorted(str(name) for name in set(mine) & set(theirs))
            if clash:
                raise ValueError(
                    f"two strategies have a {what} for {', '.join(clash)}: give one of them "
                    f"another layer or modality, or leave one out of the chain"
                )
        return Prompts(
            {**self.tokens, **other.tokens},
            {**self.aux, **other.aux},
            {**self.gates, **other.gates},
        )


NO_PROMPTS = Prompts()


@dataclass(frozen=True)
class Output:
    """Output of a model for a batch. B samples, C classes, D embedding dim, V vocabulary size.

    For generative samples it holds only the S positions that are in the loss, sample after sample.

    Attributes:
        logits: (B, C) class scores, or (S, V) token scores.
        image: (B, D) pooled image embedding of unit length, or None.
        text: (B, D) embedding of each sample's text, or (C, D) of each class name, of unit length,
            or None.
        prompts: prompts of the forward pass.
        sample_index: (S,) int64 index of the sample that each position belongs to, or None.
        target_ids: (S,) int64 target token of each position, or None.
    """

    logits: Tensor
    image: Tensor | None = None
    text: Tensor | None = None
    prompts: Prompts = NO_PROMPTS
    sample_index: Tensor | None = None
    target_ids: Tensor | None = None


_SIGNATURES = {
    "forward": "forward(batch, prompts) -> Output",
    "loss": "loss(output, batch) -> scalar",
    "named_parameters": "named_parameters() -> (name, parameter) pairs",
    "embed": "embed(batch, modality) -> (B, D)",
    "encode_image": "encode_image(batch) -> (B, N, D)",
    "prompt_dims": "prompt_dims: {modality: token dim}",
    "freeze": "freeze(*towers)",
    "fingerprint": "fingerprint() -> str",
    "generate": "generate(batch, prompts, transform_output, candidates, max_new_tokens) -> B texts",
    "target_linears": "target_linears(target_modules) -> {name: nn.Linear}",
    "gates": "gates: {name: (B, E) weights of injected experts}",
    "transform": "transform(train) -> mmcl.core.Transform",
    "set_classes": "set_classes(names, templates, tasks)",
}
STEP_MEMBERS = ("forward", "loss", "named_parameters")
"""Members of every model: those of the protocol."""


@runtime_checkable
class VLM(Protocol):
    """Protocol of a vision-language model: three members; a model imports nothing of mmcl.

    Optional members, which some strategies need (they check with ``require``):

    * ``embed(batch, modality)`` -> (B, D) embedding of each sample, without prompts or gradient, as
      in evaluation mode.
    * ``encode_image(batch)`` -> (B, N, D) output tokens of the frozen vision tower.
    * ``prompt_dims``: modality -> dim of the tokens of the tower that prompts enter.
    * ``freeze(*towers)`` turns off the gradients of whole towers.
    * ``parts()`` -> {name: parameters} of the towers and heads, for learning rates per part.
    * ``fingerprint()`` -> str, a hash of the frozen weights.
    * ``target_linears(target_modules)`` -> the linear layers that adapters may wrap, by module
      name: "all" of them, or those of "attention" or "mlp".

    A run over a stream (``mmcl train``) needs ``transform(train)`` -> ``mmcl.core.Transform``, and
    ``set_classes(names, templates, tasks)`` where the stream has classes.

    Members of a generative model:

    * ``generate(batch, prompts, transform_output=None, candidates=(), max_new_tokens=64)`` -> B
      texts.
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


class MissingMembersError(TypeError):
    """Error for a model without members that are needed; it lists all of them with signatures.

    Args:
        model: the model.
        missing: who needs members, for example "L2P" -> names of those that the model lacks.
    """

    def __init__(self, model: object, missing: Mapping[str, Sequence[str]]) -> None:
        self.model, self.missing = model, dict(missing)
        needs = ", ".join(
            f"{by} needs {' and '.join(f'model.{_SIGNATURES.get(m, m)}' for m in members)}"
            for by, members in self.missing.items()
        )
        is_one = sum(map(len, self.missing.values())) == 1
        super().__init__(
            f"{needs}, and {type(model).__name__} has none: wrap it in mmcl.models or add the "
            f"method{'' if is_one else 's, as in docs/model.md'}"
        )


def missing_members(model: object, members: Iterable[str]) -> list[str]:
    """Return those of some members, by name, that a model lacks; ``forward`` stands for a call."""
    return [name for name in members if not _has_member(model, name)]


def _has_member(model: object, name: str) -> bool:
    if name != "forward":
        return hasattr(model, name)
    # torch's own forward only raises
    is_torchs = getattr(type(model), "forward", None) is nn.Module.forward
    return callable(model) and not (is_torchs and type(model).__call__ is nn.Module.__call__)


def require(model: object, *members: str, by: object) -> Any:
    """Check that a model has the optional members that a strategy needs, and return the model.

    Args:
        model: any model.
        members: names of optional VLM members, for example "embed".
        by: the strategy; its class name goes into the error.

    Raises:
        MissingMembersError: naming every missing member with its signature; a TypeError.
    """
    missing = missing_members(model, members)
    if missing:
        raise MissingMembersError(model, {type(by).__name__: missing})
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
    # "token_adapter" is peft's, in word embeddings some of whose rows train.
    for attribute in (*BASE_LAYER_NAMES, "token_adapter"):
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


@contextmanager
def trial_pass(model: nn.Module) -> Iterator[None]:
    """Compute inside the block what is no part of a step: in evaluation mode, and not counted.

    Modes of torch do not see it, such as the FlopCounterMode of a run's ledger.
    """
    with eval_mode(model), _disable_current_modes():
        yield


def frozen_modules(model: nn.Module, *, is_inside: bool = False) -> list[nn.Module]:
    """Return the frozen modules of a model: the outermost ones without a trainable parameter.

    A module without any parameters, such as dropout, counts only inside of a frozen one. Layers
    with ``gradient_checkpointing`` do not count, but what they consist of does: transformers
    checkpoints a layer only in training mode.

    Args:
        model: searched from the top down.
        is_inside: whether it is part of a frozen module.
    """
    flags = [parameter.requires_grad for parameter in model.parameters()]
    is_frozen = is_inside or (bool(flags) and not any(flags))
    if is_frozen and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return [model]
    return [one for part in model.children() for one in frozen_modules(part, is_inside=is_frozen)]


def set_frozen_to_eval(model: object) -> tuple[nn.Module, ...]:
    """Put the frozen modules of a model into evaluation mode, and return them.

    Else BatchNorm would move its running statistics and dropout would change the features of a
    tower that is not trained. A model that is no torch module has none.
    """
    found = frozen_modules(model) if isinstance(model, nn.Module) else []
    for module in found:
        module.eval()
    return tuple(found)


def fsdp_blocks(model: Any) -> list[nn.Module]:
    """Return the transformer blocks that every training step runs on every process, in order.

    FSDP wraps these one by one. They are ``model.blocks()`` if the model has that method, else the
    blocks of every stack with a trainable parameter: a frozen stack may be skipped in a step.

    Args:
        model: a VLM that is a torch module.
    """
    own = getattr(model, "blocks", None)
    if callable(own):
        return list(own())
    return [block for stack in module_stacks(model) if _is_trainable(stack) for block in stack]


def module_stacks(module: nn.Module) -> list[list[nn.Module]]:
    """Return every stack of a module: the blocks of a ModuleList or Sequential of one block type.

    Only outermost stacks are returned. A block has submodules and parameters: a sequence of plain
    layers is no stack.

    Args:
        module: module to search, from the top down.
    """
    found = []
    for child in module.children():
        blocks = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and len({type(block) for block in blocks}) == 1 and _is_block(blocks[0]):
            found.append(blocks)
        else:
            found += module_stacks(child)
    return found


def _is_block(module: nn.Module) -> bool:
    has_children = next(module.children(), None) is not None
    return has_children and next(module.parameters(), None) is not None


def _is_trainable(stack: list[nn.Module]) -> bool:
    return any(parameter.requires_grad for block in stack for parameter in block.parameters())
