"""Soft prompts at the word embeddings of a language model, inserted by a torch hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcl.core import Prompts
from mmcl.core.output import PromptPosition

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
        _expect_prompt_shape(learned, tokens, embeddings)
        index = self._placeholder_index(tokens, mask, learned.shape[1])[:, :, None]

        def fill(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            if embedded.shape[:2] != tokens.shape:  # a later step of a generation
                return embedded
            where = index.expand(-1, -1, embedded.shape[2])
            return embedded.scatter(1, where, learned.to(embedded.dtype))

        hook = embeddings.register_forward_hook(fill)
        try:
            yield
        finally:
            hook.remove()

    def _placeholder_index(self, tokens: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """Return (B, P) index of each sample's placeholders."""
        offsets = torch.arange(count, device=tokens.device) + self.offset
        if mask is None:
            return offsets.expand(len(tokens), -1)
        return mask.int().argmax(1)[:, None] + offsets


def _expect_prompt_shape(learned: Tensor, tokens: Tensor, embeddings: nn.Module) -> None:
    dim = getattr(embeddings, "embedding_dim", learned.shape[-1])
    if learned.shape[0] != len(tokens) or learned.shape[-1] != dim:
        raise ValueError(
            f"prompts are {tuple(learned.shape)}, expected ({len(tokens)}, P, {dim}): give every "
            "sample its own prompts of dim model.prompt_dims['text']"
        )
