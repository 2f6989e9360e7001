"""Sample: conversation, references and transform of one sample.

Transforms and conversations are what a model's author implements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

IMAGE_TOKEN = "<image>"
"""Mark of an image in a question, as in LLaVA's files."""


class BadSample(ValueError):
    """One sample cannot be used; its text is the reason, without the sample's name."""


Pixels = Tensor | tuple[Tensor, ...] | None
"""Decoded image (3, H, W) uint8 of any size; several of a conversation; or none."""


def each_image(pixels: Pixels) -> tuple[Tensor, ...]:
    """Return the images (3, H, W) of a sample."""
    return () if pixels is None else pixels if isinstance(pixels, tuple) else (pixels,)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "user" asks, "assistant" answers, "system" instructs.
        text: instruction, question or answer; each ``<image>`` in a question marks where the next
            image of the sample stands, one in another text is plain text.
    """

    role: Literal["system", "user", "assistant"]
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
    """Conversation about images: questions and answers in turn, the last answer is the target.

    Attributes:
        turns: user and assistant in turn, after a turn of the system if there is one.
        answers: reference answers, any of which is correct in place of the last turn.
    """

    turns: tuple[Turn, ...]
    answers: tuple[str, ...]

    @property
    def system(self) -> str | None:
        """Text of the system's turn, None if there is none."""
        return self.turns[0].text if self.turns[0].role == "system" else None

    @property
    def dialogue(self) -> tuple[Turn, ...]:
        """The turns without the system's: an even number, the user's first."""
        return self.turns[self.system is not None :]

    @property
    def reference(self) -> Reference:
        """Last question with its reference answers."""
        question = self.turns[-2].text.replace(IMAGE_TOKEN, "").strip()
        return Reference(question, self.answers)


@dataclass(frozen=True)
class ProcessedSample:
    """A sample as tensors for a model, before it is collated into a batch.

    Attributes:
        image: (3, H, W) uint8 at the model's image size, (m, 3, H, W) of m images, or None.
        input_ids: (L,) int64 token ids up to the end token, without padding, or None.
        labels: (L,) int64 target tokens, IGNORE_INDEX where no token is in the loss; None for
            samples that are classified or matched.
        image_inputs: see ``Batch.image_inputs``, one for each image of the sample, or empty.
        note: what was cut off, as a sentence without the sample's name, or "".
    """

    image: Tensor | None
    input_ids: Tensor | None = None
    labels: Tensor | None = None
    image_inputs: tuple[Mapping[str, Tensor], ...] = ()
    note: str = ""

    @property
    def num_images(self) -> int:
        """Number m of images."""
        if self.image_inputs or self.image is None:
            return len(self.image_inputs)
        return 1 if self.image.dim() == 3 else len(self.image)


class Transform(Protocol):
    """Protocol of a model's transform of one sample; picklable, since loader workers run it.

    One that turns images into tokens of a text may have ``tokens_per_image``, None where their
    number depends on the size, and ``image_tokens(sizes)`` -> tokens of the images of a sample,
    given their (height, width): then ``group_by_length`` counts them.
    """

    def __call__(
        self, pixels: Pixels, text: str | Conversation | None, seed: int
    ) -> ProcessedSample:
        """Resize and augment the image of a sample, tokenize its text.

        Args:
            pixels: (3, H, W) uint8 decoded image of any size; several, which only conversations
                have; or None.
            text: a caption, a conversation, or None if the task has neither.
            seed: seed of this sample's augmentation; a function of sample and epoch, so it is the
                same on any rank and in any worker.
        """
        ...
