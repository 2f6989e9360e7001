"""Where learned prompts enter a language model: at its word embeddings, through a torch hook."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcl.core import Prompts
from mmcl.core.output import Place

_INPUT: Place = ("text", 0)


@dataclass(frozen=True)
class Entrance:
    """Leaves room for prompts in rows of tokens and fills it with them.

    Attributes:
        begins: tokens that every row starts with before prompts: 1, the begin token, or 0.
        pad: token that stands where there is none.
    """

    begins: int
    pad: int

    def room(self, prompts: Prompts) -> int:
        """Return P, the tokens that prompts take.

        Raises:
            ValueError: if a prompt is for another place than the language model's input.
        """
        other = [place for place in prompts.tokens if place != _INPUT]
        if other:
            raise ValueError(
                f"prompts enter at {other[0]}, and a model that answers takes them at {_INPUT} "
                "only: use modality='text' at layer 0"
            )
        learned = prompts.tokens.get(_INPUT)
        return 0 if learned is None else int(learned.shape[1])

    def with_room(self, tokens: Tensor, room: int) -> Tensor:
        """Return (B, P + L) tokens with ``room`` pads behind the begin token."""
        if room == 0:
            return tokens
        blank = tokens.new_full((len(tokens), room), self.pad)
        return torch.cat([tokens[:, : self.begins], blank, tokens[:, self.begins :]], 1)

    @contextmanager
    def open(
        self, words: nn.Module, prompts: Prompts, tokens: Tensor, mask: Tensor | None
    ) -> Iterator[None]:
        """Let prompts take the place of the embeddings of their room.

        Args:
            words: embeds tokens.
            prompts: of the rows.
            tokens: (B, P + L) that the forward pass is given.
            mask: (B, P + L) bool of real tokens, or None where rows begin at their first token.

        Raises:
            ValueError: if prompts are not (B, P, D).
        """
        learned = prompts.tokens.get(_INPUT)
        if learned is None:
            yield
            return
        _expect_rows(learned, tokens, words)
        index = self._places(tokens, mask, learned.shape[1])[:, :, None]

        def fill(module: nn.Module, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            if embedded.shape[:2] != tokens.shape:  # a later step of a generation
                return embedded
            where = index.expand(-1, -1, embedded.shape[2])
            return embedded.scatter(1, where, learned.to(embedded.dtype))

        hook = words.register_forward_hook(fill)
        try:
            yield
        finally:
            hook.remove()

    def _places(self, tokens: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """Return (B, P) where the room of each row lies."""
        offsets = torch.arange(count, device=tokens.device) + self.begins
        if mask is None:
            return offsets.expand(len(tokens), -1)
        return mask.int().argmax(1)[:, None] + offsets


def _expect_rows(learned: Tensor, tokens: Tensor, words: nn.Module) -> None:
    width = getattr(words, "embedding_dim", learned.shape[-1])
    if learned.shape[0] != len(tokens) or learned.shape[-1] != width:
        raise ValueError(
            f"prompts are {tuple(learned.shape)}, expected ({len(tokens)}, P, {width}): give every "
            "row its own prompts as wide as model.widths['text']"
        )
