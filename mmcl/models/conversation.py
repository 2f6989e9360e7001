"""From a dialogue to tokens and to the tokens that are scored, in a model's own chat format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core import PICTURE, UNSCORED, Dialogue, Turn

_QUESTION, _ANSWER = "QqzQ", "AaxA"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)


@dataclass(frozen=True)
class Pieces:
    """The fixed texts around questions and answers.

    Attributes:
        head: before the first question of a dialogue without a picture.
        shown: the same with the picture's mark in it.
        middle: between a question and its answer; generation goes on behind it.
        lead: what an answer begins with before its own words, scored with it.
        end: what ends an answer and generation, scored.
        between: between an answer's end and the next question.
    """

    head: str
    shown: str
    middle: str
    lead: str
    end: str
    between: str


def vicuna(picture: str, end: str) -> Pieces:
    """Return the format of LLaVA-1.5 ("vicuna_v1"), for models without a chat template."""
    return Pieces(
        head=f"{_VICUNA}USER: ", shown=f"{_VICUNA}USER: {picture}\n", middle=" ASSISTANT:",
        lead=" ", end=end, between="USER: ",
    )  # fmt: skip


def pieces_of(processor: Any, picture: str, ends: Sequence[str]) -> Pieces:
    """Find the fixed texts of a processor's chat template by rendering dialogues of known words.

    Args:
        processor: with ``apply_chat_template``.
        picture: text of its picture token.
        ends: texts of the tokens that end a generation. Where the template puts none behind an
            answer, as LLaVA-1.5's, the first is added: else a model would never learn to stop.

    Raises:
        ValueError: if the template does more than put texts around questions and answers.
    """

    def rendered(turns: int, shows: bool, asks: bool) -> str:
        said = [_message(place, shows and place == 0) for place in range(turns)]
        text: str = processor.apply_chat_template(said, tokenize=False, add_generation_prompt=asks)
        return text

    asked, shown = rendered(1, False, True), rendered(1, True, True)
    told, twice = rendered(2, False, False), rendered(3, False, True)
    head, middle = _split(asked, _QUESTION)
    shown_head, _ = _split(shown, _QUESTION)
    before, after = _split(told, _ANSWER)
    lead = before.removeprefix(asked)
    rest = twice.removeprefix(before + _ANSWER)
    gap, _ = _split(rest, _QUESTION)
    is_plain = before.startswith(asked) and twice.startswith(before + _ANSWER)
    if not is_plain or picture not in shown_head:
        raise ValueError(
            "the model's chat template does more than put texts around questions and answers: "
            "give style='vicuna_v1', or a template that does no more"
        )
    found = sorted((gap.find(end), end) for end in ends if end in gap)
    end = found[0][1] if found else ends[0]
    ending, _, between = gap.partition(end) if found else ("", "", gap.lstrip())
    return Pieces(head, shown_head, middle, lead, ending + end, between)


def _message(place: int, shows: bool) -> dict[str, Any]:
    word = _ANSWER if place % 2 else _QUESTION
    content = [{"type": "image"}] if shows else []
    role = "assistant" if place % 2 else "user"
    return {"role": role, "content": [*content, {"type": "text", "text": word}]}


def _split(text: str, word: str) -> tuple[str, str]:
    before, found, after = text.partition(word)
    if not found:
        raise ValueError(
            "the model's chat template leaves out what is said: give style='vicuna_v1', or a "
            "template that keeps it"
        )
    return before, after


@dataclass(frozen=True)
class Conversation:
    """Turns dialogues into tokens; picklable.

    A picture's mark goes to the front of the first question, as LLaVA does, and becomes as many
    placeholder tokens as the model makes of a picture of its size.

    Attributes:
        tokenizer: a fast one of transformers.
        pieces: texts around questions and answers.
        picture: token text of a picture's mark.
        expanded: text that stands for a whole picture.
        specials: texts of tokens that nobody may say.
        max_length: tokens of a row at most; what is behind is cut off.
    """

    tokenizer: Any
    pieces: Pieces
    picture: str
    expanded: str
    specials: tuple[str, ...] = ()
    max_length: int = 2048

    def encode(self, dialogue: Dialogue, shows: bool) -> tuple[Tensor, Tensor]:
        """Return tokens (L,) and labels (L,): the assistant's words with their end, else UNSCORED.

        Args:
            dialogue: the turns.
            shows: whether there is a picture.
        """
        parts = list(self._parts(dialogue, shows))
        text = "".join(part for part, _ in parts)
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=not self._begins(text)
        )
        starts = torch.tensor([start for start, _ in encoded["offset_mapping"]])
        widths = torch.tensor([end - start for start, end in encoded["offset_mapping"]])
        tokens = torch.tensor(encoded["input_ids"])
        is_said = torch.zeros(len(tokens), dtype=torch.bool)
        place = 0
        for part, is_scored in parts:
            if is_scored:
                is_said |= (starts >= place) & (starts < place + len(part)) & (widths > 0)
            place += len(part)
        labels = tokens.masked_fill(~is_said, UNSCORED)
        return tokens[: self.max_length], labels[: self.max_length]

    def answer_tokens(self, text: str) -> Tensor:
        """Return the scored tokens (L,) of an answer, its end included."""
        turns = (Turn("human", "?"), Turn("assistant", text))
        tokens, labels = replace(self, max_length=1 << 30).encode(Dialogue(turns, (text,)), False)
        return tokens[labels != UNSCORED]

    @property
    def first_token(self) -> int:
        """The token that every row begins with."""
        turns = (Turn("human", "?"), Turn("assistant", "!"))
        return int(self.encode(Dialogue(turns, ("!",)), False)[0][0])

    def _parts(self, dialogue: Dialogue, shows: bool) -> Iterator[tuple[str, bool]]:
        """Give texts in order, and whether each is scored."""
        pieces = self.pieces
        for place in range(0, len(dialogue.turns), 2):
            opening = pieces.between
            if place == 0:
                opening = pieces.shown if shows else pieces.head
                opening = opening.replace(self.picture, self.expanded)
            asked = self._plain(dialogue.turns[place].text)
            said = self._plain(dialogue.turns[place + 1].text)
            yield opening + asked + pieces.middle, False
            yield pieces.lead + said + pieces.end, True

    def _plain(self, text: str) -> str:
        """Return a text without the picture's mark, and without words that are tokens of their own.

        A text of a dataset must not be able to end an answer or to show a picture.
        """
        marks = (PICTURE, *self.specials)
        while found := [mark for mark in marks if mark in text]:
            for mark in found:  # what is left around one may make another
                text = text.replace(mark, "")
        return text.strip()

    def _begins(self, text: str) -> bool:
        first = self.tokenizer.bos_token
        return bool(first) and text.startswith(first)
