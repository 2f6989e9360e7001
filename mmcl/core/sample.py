"""What a sample says (a dialogue), and how it becomes what a model takes (Row, Transform)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

PICTURE = "<image>"
"""Stands in a dialogue's text where the picture is shown, as in LLaVA's files."""


@dataclass(frozen=True)
class Turn:
    """One thing said.

    Attributes:
        speaker: "human" asks, "assistant" answers.
        text: what is said; ``<image>`` stands where a picture is shown.
    """

    speaker: Literal["human", "assistant"]
    text: str


@dataclass(frozen=True)
class Reference:
    """What a row was asked last, and what counts as right.

    Attributes:
        question: without the picture's mark.
        answers: at least one.
    """

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Dialogue:
    """What is said about a picture, the human first, in turns; the last turn is the answer asked.

    Attributes:
        turns: an even number of them.
        answers: all that count as right in place of the last turn.
    """

    turns: tuple[Turn, ...]
    answers: tuple[str, ...]

    @property
    def reference(self) -> Reference:
        """The last question and its right answers."""
        question = self.turns[-2].text.replace(PICTURE, "").strip()
        return Reference(question, self.answers)


@dataclass(frozen=True)
class Row:
    """A sample as its model takes it.

    Attributes:
        image: (3, H, W) uint8 at the model's size, or None.
        tokens: (L,) int64 without padding after the end token, or None.
        labels: (L,) int64, the tokens that are scored, UNSCORED elsewhere; None for rows that are
            classified or matched.
    """

    image: Tensor | None
    tokens: Tensor | None = None
    labels: Tensor | None = None


class Transform(Protocol):
    """What a model does to one sample; picklable, so that loader workers can run it."""

    def __call__(self, pixels: Tensor | None, text: str | Dialogue | None, seed: int) -> Row:
        """Resize and augment a picture, tokenise a text.

        Args:
            pixels: (3, H, W) uint8 as decoded, any size.
            text: a caption, a dialogue, or None where the task has neither.
            seed: of this sample's augmentation, the same whenever the sample is met in the same
                epoch, on any rank and in any worker.
        """
        ...
