"""Soft prompts and expert gates of a forward pass: what a strategy adds to a language model.

Prompts are inserted by a torch hook on the word embeddings. Only models fill the gates;
``mmcl.layers`` reads them as a plain mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core import Prompts
from mmcl.core.model import PromptPosition

_INPUT: PromptPosition = ("text", 0)


@dataclass(frozen=True)
class SoftPromptInserter:
    """Soft-prompt inserter: adds placeholder tokens and replaces their embeddings by prompts.

    Attributes:
        offset: number of tokens before the prompts: 1, the begin token, or 0.
        placeholder: token whose embeddings are replaced.
    """

    offset: int
    placeholder: int

    def length(self, prompts: Prompts) -> int:
        """Return P, the length of the prompts in tokens.

        Raises:
            ValueError: if a prompt is not for the language model's input.
        """
        others = [position for position in prompts.tokens if position != _INPUT]
        if others:
            raise ValueError(
                f"prompts enter at {others[0]}, but a generative model takes them at {_INPUT} "
                "only: use modality='text' at layer 0"
            )
        learned = prompts.tokens.get(_INPUT)
        return 0 if learned is None else int(learned.shape[1])

    def insert_placeholders(self, tokens: Tensor, length: int) -> Tensor:
        """Return (B, P + L) tokens with ``length`` placeholders after the begin token."""
        if length == 0:
            return tokens
        placeholders = tokens.new_full((len(tokens), length), self.placeholder)
        return torch.cat([tokens[:, : self.offset], placeholders, tokens[:, self.offset :]], 1)

    @contextmanager
    def inject_prompts(
        self, embeddings: nn.Module, prompts: Prompts, tokens: Tensor, mask: Tensor | None
    ) -> Iterator[None]:
        """Replace the embeddings of the placeholders by prompts, in this context.

        Args:
            embeddings: word embedding layer.
            prompts: of the samples.
            tokens: (B, P + L) input of the forward pass.
            mask: (B, P + L) bool of real tokens, or None where samples are not padded on the left.

        Raises:
            ValueError: if prompts are not (B, P, D).
        """
        learned = prompts.tokens.get(_INPUT)
        if learned is None:
            yield
            return
        dim = getattr(embeddings, "embedding_dim", learned.shape[-1])
        if learned.shape[0] != len(tokens) or learned.shape[-1] != dim:
            raise ValueError(
                f"prompts are {tuple(learned.shape)}, expected ({len(tokens)}, P, {dim}): give "
                "every sample its own prompts of dim model.prompt_dims['text']"
            )
        index = (torch.arange(learned.shape[1], device=tokens.device) + self.offset)[None, :, None]
        if mask is not None:
            index = mask.int().argmax(1)[:, None, None] + index

        def fill(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            if embedded.shape[:2] != tokens.shape:  # a later step of a generation
                return embedded
            where = index.expand(len(embedded), -1, embedded.shape[2])
            return embedded.scatter(1, where, learned.to(embedded.dtype))

        hook = embeddings.register_forward_hook(fill)
        try:
            yield
        finally:
            hook.remove()


class ExpertGates(dict[str, Tensor]):
    """Gates (B, E) of the current forward pass by the name of the experts; a deep copy is empty.

    Gates may be part of an autograd graph, and torch cannot deep-copy such tensors.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertGates:
        """Return empty gates, which the copied layers share."""
        return ExpertGates()


class GateReplayContext:
    """Context function of ``torch.utils.checkpoint`` that restores the gates of the first pass.

    A checkpointed layer runs again in the backward pass, when another forward pass (a teacher's)
    may have changed the gates.

    Args:
        gates: the model's gates, which its layers read.
    """

    def __init__(self, gates: MutableMapping[str, Tensor]) -> None:
        self.gates = gates

    def __call__(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of the first pass and of its repetition."""
        return nullcontext(), self._restored(dict(self.gates))

    @contextmanager
    def _restored(self, gates: dict[str, Tensor]) -> Iterator[None]:
        later = dict(self.gates)
        self.gates.clear()
        self.gates.update(gates)
        try:
            yield
        finally:
            self.gates.clear()
            self.gates.update(later)
