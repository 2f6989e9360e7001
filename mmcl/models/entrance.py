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
        begin: token that rows start with, or None; prompts stand behind it.
        pad: token that stands where there is none.
    """

    begin: int | None
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
        begin = self.begins(tokens[:1])
        blank = tokens.new_full((len(tokens), room), self.pad)
        return torch.cat([tokens[:, :begin], blank, tokens[:, begin:]], 1)

    def begins(self, tokens: Tensor) -> int:
        """Return 1 if the first row starts with the begin token, else 0."""
        is_there = self.begin is not None and tokens.numel() > 0
        return int(is_there and int(tokens.flatten()[0]) == self.begin)

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
        """
        learned = prompts.tokens.get(_INPUT)
        if learned is None:
            yield
            return
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
        offsets = torch.arange(count, device=tokens.device)
        if mask is None:
            return (offsets + self.begins(tokens[:1])).expand(len(tokens), -1)
        first = mask.int().argmax(1)
        start = self.begins(tokens[0, first[0] :])
        return (first + start)[:, None] + offsets
