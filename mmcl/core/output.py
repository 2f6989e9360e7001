"""Prompts: what a strategy adds to a forward pass. Output: logits and embeddings of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

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

    def merge(self, other: Prompts) -> Prompts:
        """Return the union of two strategies' prompts.

        Raises:
            ValueError: if both use the same position, or the same name of a note or gate.
        """
        if not (other.tokens or other.aux or other.gates):
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
