"""Prompts: what goes into a tower. Output: what comes out of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Modality = Literal["image", "text"]
Place = tuple[Modality, int]
"""A tower and a layer of it; layer 0 is the tower's input."""


@dataclass(frozen=True)
class Prompts:
    """What a strategy puts into a forward pass. B rows, P prompt tokens, D width of the tower.

    Attributes:
        tokens: (tower, layer) -> (B, P, D).
        notes: what ``penalty`` will need again, for example "match" (B, top_k).
        gates: name of installed experts -> (B, E), how much each weighs for each row.
    """

    tokens: Mapping[Place, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Tensor] = field(default_factory=dict)
    gates: Mapping[str, Tensor] = field(default_factory=dict)

    def merge(self, other: Prompts) -> Prompts:
        """Return the prompts of both.

        Raises:
            ValueError: if both prompt the same place or use the same note name.
        """
        if not (other.tokens or other.notes or other.gates):
            return self
        for what, mine, theirs in (
            ("prompt", self.tokens, other.tokens),
            ("note", self.notes, other.notes),
            ("gate", self.gates, other.gates),
        ):
            clash = sorted(str(name) for name in set(mine) & set(theirs))
            if clash:
                raise ValueError(
                    f"two strategies {what} the same place {', '.join(clash)}: give one of them "
                    f"another layer or modality, or leave one out of the chain"
                )
        return Prompts(
            {**self.tokens, **other.tokens},
            {**self.notes, **other.notes},
            {**self.gates, **other.gates},
        )


NO_PROMPTS = Prompts()


@dataclass(frozen=True)
class Output:
    """What a model says of a batch. B rows, C classes, D embedding width, V vocabulary.

    Of rows that are answered only the S scored positions are here, row after row.

    Attributes:
        logits: (B, C) class scores, or (S, V) token scores.
        image: (B, D) pooled image embedding of unit length, or None.
        text: (B, D) one per row, or (C, D) one per class name, of unit length, or None.
        prompts: what the forward pass was prompted with.
        rows: (S,) int64 the row of each scored position, or None.
        targets: (S,) int64 the token that is right there, or None.
    """

    logits: Tensor
    image: Tensor | None = None
    text: Tensor | None = None
    prompts: Prompts = NO_PROMPTS
    rows: Tensor | None = None
    targets: Tensor | None = None
