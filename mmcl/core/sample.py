"""Sample: its conversation, its reference answers, and the transform to tensors for a model.

A file of its own: transforms and conversations are what a model's author implements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

IMAGE_TOKEN = "<image>"
"""Placeholder of the image in the text of a conversation, as in LLaVA's files."""


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "human" asks, "assistant" answers.
        text: question or answer; ``<image>`` marks the position of an image.
    """

    role: Literal["human", "assistant"]
    text: str


@dataclass(frozen=True)
class Reference:
    """Last question of a sample with its reference answers.

    Attributes:
        question: text without ``<image>``.
        answers: at least one; any of them is correct.
    """

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Conversation:
    """ChatTokenizer about an image: questions and answers in turn, the last answer is the target.

    Attributes:
        turns: an even number of turns, the human's first.
        answers: reference answers, any of which is correct in place of the last turn.
    """

    turns: tuple[Turn, ...]
    answers: tuple[str, ...]

    @property
    def reference(self) -> Reference:
        """Last question with its reference answers."""
        question = self.turns[-2].text.replace(IMAGE_TOKEN, "").strip()
        return Reference(question, self.answers)


@dataclass(frozen=True)
class ProcessedSample:
    """A sample as tensors for a model, before it is collated into a batch.

    Attributes:
        image: (3, H, W) uint8 at the model's image size, or None.
        tokens: (L,) int64 token ids up to the end token, without padding, or None.
        labels: (L,) int64 target tokens, IGNORE_INDEX where no token is in the loss; None for
            samples that are classified or matched.
    """

    image: Tensor | None
    tokens: Tensor | None = None
    labels: Tensor | None = None


class Transform(Protocol):
    """Protocol of a model's transform of one sample; picklable, since loader workers run it."""

    def __call__(
        self, pixels: Tensor | None, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Resize and augment the image of a sample, tokenize its text.

        Args:
            pixels: (3, H, W) uint8 decoded image of any size, or None.
            text: a caption, a conversation, or None if the task has neither.
            seed: seed of this sample's augmentation; a function of sample and epoch, so it is the
                same on any rank and in any worker.
        """
        ...
