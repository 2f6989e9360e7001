"""Chat templates: from a conversation to tokens and labels in a model's own format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core import IGNORE_INDEX, IMAGE_TOKEN, Conversation, Turn

_QUESTION, _ANSWER = "QqzQ", "AaxA"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


@dataclass(frozen=True)
class TemplateParts:
    """Parts of a chat template: the fixed texts around questions and answers.

    Attributes:
        start: before the first question of a conversation without an image.
        image_start: the same with the image token in it.
        before_answer: between a question and its answer; generation starts after it.
        answer_start: between ``before_answer`` and the text of an answer, in the loss.
        answer_end: ends an answer and generation, in the loss.
        between_turns: between an answer's end and the next question.
    """

    start: str
    image_start: str
    before_answer: str
    answer_start: str
    answer_end: str
    between_turns: str


def vicuna(image_token: str, end: str) -> TemplateParts:
    """Return the template of LLaVA-1.5 ("vicuna_v1"), for models without a chat template."""
    return TemplateParts(
        start=f"{_VICUNA}USER: ", image_start=f"{_VICUNA}USER: {image_token}\n",
        before_answer=" ASSISTANT:", answer_start=" ", answer_end=end, between_turns="USER: ",
    )  # fmt: skip


def parse_chat_template(processor: Any, image_token: str, ends: Sequence[str]) -> TemplateParts:
    """Parse a processor's chat template by rendering conversations of known words.

    Args:
        processor: with ``apply_chat_template``.
        image_token: text of its image token.
        ends: texts of the tokens that end a generation. Where the template puts none after an
            answer, as LLaVA-1.5's, the first is added: else a model would never learn to stop.

    Raises:
        ValueError: if the template does more than put texts around questions and answers.
    """

    def rendered(turns: int, has_image: bool, add_generation_prompt: bool) -> str:
        messages = [_message(index, has_image and index == 0) for index in range(turns)]
        text: str = processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    prompt, image_prompt = rendered(1, False, True), rendered(1, True, True)
    answered, two_questions = rendered(2, False, False), rendered(3, False, True)
    start, before_answer = _split(prompt, _QUESTION)
    image_start, _ = _split(image_prompt, _QUESTION)
    before, after = _split(answered, _ANSWER)
    answer_start = before.removeprefix(prompt)
    rest = two_questions.removeprefix(before + _ANSWER)
    gap, _ = _split(rest, _QUESTION)
    is_plain = before.startswith(prompt) and two_questions.startswith(before + _ANSWER)
    if not is_plain or image_token not in image_start:
        raise ValueError(
            "the model's chat template does more than put texts around questions and answers: "
            "give conv_template='vicuna_v1', or a template that does no more"
        )
    found = sorted((gap.find(end), end) for end in ends if end in gap)
    end = found[0][1] if found else ends[0]
    ending, _, between_turns = gap.partition(end) if found else ("", "", gap.lstrip())
    ending += end
    return TemplateParts(start, image_start, before_answer, answer_start, ending, between_turns)


def _message(index: int, has_image: bool) -> dict[str, Any]:
    text = _ANSWER if index % 2 else _QUESTION
    images = [{"type": "image"}] if has_image else []
    role = "assistant" if index % 2 else "user"
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


def _split(text: str, word: str) -> tuple[str, str]:
    before, found, after = text.partition(word)
    if not found:
        raise ValueError(
            "the model's chat template leaves out a question or an answer: give "
            "conv_template='vicuna_v1', or a template that keeps them"
        )
    return before, after


@dataclass(frozen=True)
class ChatTokenizer:
    """Chat tokenizer: turns conversations into tokens and labels; can be pickled.

    The image token goes to the front of the first question, as in LLaVA, and is expanded to the
    placeholder tokens of one image of the model's size.

    Attributes:
        tokenizer: a fast one of transformers.
        template: fixed texts around questions and answers.
        image_token: text of the image token.
        image_placeholders: text of one whole image.
        special_tokens: texts of tokens that are removed from questions and answers.
        max_length: largest number of tokens of a sample; the rest is cut off.
    """

    tokenizer: Any
    template: TemplateParts
    image_token: str
    image_placeholders: str
    special_tokens: tuple[str, ...] = ()
    max_length: int = 2048

    def tokenize(self, conversation: Conversation, has_image: bool) -> tuple[Tensor, Tensor]:
        """Return tokens (L,) and labels (L,): answers with their ends, IGNORE_INDEX elsewhere.

        Args:
            conversation: the turns.
            has_image: whether the sample has an image.
        """
        segments = list(self._segments(conversation, has_image))
        text = "".join(segment for segment, _ in segments)
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=not self._has_begin_token(text)
        )
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        lengths = torch.tensor([end - start for start, end in encoded["offset_mapping"]])
        tokens = torch.tensor(encoded["input_ids"])
        in_answer = torch.zeros(len(tokens), dtype=torch.bool)
        offset = 0
        for segment, is_answer in segments:
            if is_answer:
                in_answer |= (starts >= offset) & (starts < offset + len(segment)) & (lengths > 0)
            offset += len(segment)
        labels = tokens.masked_fill(~in_answer, IGNORE_INDEX)
        return tokens[: self.max_length], labels[: self.max_length]

    def answer_tokens(self, text: str) -> Tensor:
        """Return the tokens (L,) of an answer that are in the loss, its end included."""
        turns = (Turn("user", "?"), Turn("assistant", text))
        whole = replace(self, max_length=1 << 30)
        tokens, labels = whole.tokenize(Conversation(turns, (text,)), False)
        return tokens[labels != IGNORE_INDEX]

    @property
    def first_token(self) -> int:
        """First token of every conversation."""
        turns = (Turn("user", "?"), Turn("assistant", "!"))
        return int(self.tokenize(Conversation(turns, ("!",)), False)[0][0])

    def _segments(self, conversation: Conversation, has_image: bool) -> Iterator[tuple[str, bool]]:
        """Yield the texts in order, and whether each is an answer."""
        template = self.template
        for index in range(0, len(conversation.turns), 2):
            before = template.between_turns
            if index == 0:
                before = template.image_start if has_image else template.start
                before = before.replace(self.image_token, self.image_placeholders)
            question = self._clean(conversation.turns[index].text)
            answer = self._clean(conversation.turns[index + 1].text)
            yield before + question + template.before_answer, False
            yield template.answer_start + answer + template.answer_end, True

    def _clean(self, text: str) -> str:
        """Return a text without image and special tokens.

        A text of a dataset must not be able to end an answer or to insert an image.
        """
        reserved = (IMAGE_TOKEN, *self.special_tokens)
        while found := [token for token in reserved if token in text]:
            for token in found:  # removing one may join its neighbors to another
                text = text.replace(token, "")
        return text.strip()

    def _has_begin_token(self, text: str) -> bool:
        begin = self.tokenizer.bos_token
        return bool(begin) and text.startswith(begin)
