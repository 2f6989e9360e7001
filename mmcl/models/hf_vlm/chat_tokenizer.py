"""Chat tokenizer: from a conversation to tokens and labels in a model's own format, and back."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mmcl.core import IGNORE_INDEX, IMAGE_TOKEN, BadSample, Conversation, Turn
from mmcl.models.hf_vlm.chat_template import SLOT, ChatTemplate, Part, Shape

TooLong = Literal["drop", "cut"]
Kind = Literal["fixed", "text", "image"]
_KEPT_PLACEHOLDERS = 1024
_HIDDEN_MARK = "\ue000\ue001\ue000"
_IMAGE_NAMES = re.compile(r"(?i)image|img|vision|video|audio|boi|eoi|(?:row|col)_\d")
_CONTENT_NAMES = re.compile(r"(?i)think|tool|function")
_TAGS = re.compile(r"(</?think>)")
_MARKS_IN_FRONT = re.compile(rf"(?:{IMAGE_TOKEN}\s*)+")


@dataclass(frozen=True)
class EncodedConversation:
    """Encoded conversation.

    Attributes:
        input_ids: (L,) tokens.
        labels: (L,) answers with their ends, IGNORE_INDEX elsewhere.
        note: what was cut off, as a sentence without the sample's name, or "".
    """

    input_ids: Tensor
    labels: Tensor
    note: str = ""


@dataclass(frozen=True)
class _Piece:
    """Piece of the text that is tokenized: the template's own, the conversation's, or an image."""

    text: str
    is_answer: bool
    kind: Kind


@dataclass(frozen=True)
class ChatTokenizer:
    """Chat tokenizer: turns conversations into tokens and labels; can be pickled.

    Texts are learned as they are given, with the special tokens in them, such as those of a box or
    of a tool. Tokens with a role in the format (an end, a role, a part of an image) are refused.

    Attributes:
        tokenizer: a fast one of transformers.
        template: fixed texts around questions and answers.
        reserved_ids: tokens that no text of a conversation may hold, see ``reserved_token_ids``.
        max_length: largest number of tokens of a sample.
        too_long: what happens in training to a longer sample: "drop" leaves it out, "cut" keeps its
            first tokens, so that the end of its answer is not learned.
    """

    tokenizer: Any
    template: ChatTemplate
    reserved_ids: frozenset[int] = frozenset()
    max_length: int = 2048
    too_long: TooLong = "drop"

    def __post_init__(self) -> None:
        """Check ``too_long``."""
        if self.too_long not in get_args(TooLong):
            raise ValueError(f"too_long is {self.too_long!r}, expected 'drop' or 'cut'")

    def tokenize(self, conversation: Conversation, images: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return tokens (L,) and labels (L,) of ``encode`` in training."""
        encoded = self.encode(conversation, images)
        return encoded.input_ids, encoded.labels

    def encode(
        self, conversation: Conversation, images: Sequence[str], *, in_training: bool = True
    ) -> EncodedConversation:
        """Encode a conversation in the model's format.

        White space at the ends of a question and behind marks at its front is left out; all other
        white space is for the chat template to keep or to leave out.

        Args:
            conversation: the turns; an ``<image>`` in a question stands for the next image, and is
                plain text elsewhere. Without a mark, all images are in front of the first question.
            images: placeholder tokens of each image, as a text.
            in_training: False for evaluation, which ignores tokens from the last answer on: there a
                long answer is cut without a note.

        Raises:
            BadSample: if there are not as many marks as images, the chat template has no place for
                a turn, a text holds a reserved token, or the sample is too long.
        """
        pieces = self._pieces(conversation, images)
        ids, owners = self._ids(pieces)
        texts = {number for number, piece in enumerate(pieces) if piece.kind == "text"}
        self._expect_no_reserved(
            token for token, owner in zip(ids, owners, strict=True) if owner in texts
        )
        if len(ids) > self.max_length:
            return self._limited(ids, pieces, owners, in_training)
        return EncodedConversation(torch.tensor(ids), torch.tensor(_labels(ids, pieces, owners)))

    def render(self, conversation: Conversation, images: Sequence[str]) -> str:
        """Return the text of a conversation in the model's format; arguments as of ``encode``."""
        return "".join(piece.text for piece in self._pieces(conversation, images))

    def answer_tokens(self, text: str) -> Tensor:
        """Return the tokens (L,) of an answer that are in the loss, its end included."""
        turns = (Turn("user", "?"), Turn("assistant", text))
        pieces = self._pieces(Conversation(turns, (text,)), ())
        ids, owners = self._ids(pieces)
        labels = _labels(ids, pieces, owners)
        return torch.tensor([token for token in labels if token != IGNORE_INDEX])

    def decode(self, tokens: Tensor) -> str:
        """Return the text of a generated answer.

        Special tokens that an answer may hold are kept; ends, padding and other reserved tokens are
        left out, and so is white space at both ends.

        Args:
            tokens: (K,) tokens after a question.
        """
        dropped = {*self.reserved_ids, self.tokenizer.unk_token_id}
        kept = [token for token in tokens.tolist() if token not in dropped]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False)).strip()

    @property
    def first_token(self) -> int:
        """First token of a conversation with an image; PaliGemma's begin token follows images."""
        turns = (Turn("user", "?"), Turn("assistant", "!"))
        images = (self.template.image_token,)
        return int(self.encode(Conversation(turns, ("!",)), images).input_ids[0])

    def _divide(self, conversation: Conversation, images: int) -> tuple[Shape, list[str]]:
        """Divide a conversation into its shape and the words of its texts, without outer space."""
        turns = list(conversation.turns)
        marks = sum(turn.text.count(IMAGE_TOKEN) for turn in turns if turn.role == "user")
        if images and not marks:
            first = next(number for number, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", IMAGE_TOKEN * images + turns[first].text)
        elif marks != images:
            raise BadSample(
                f"its questions have {marks} image marks ({IMAGE_TOKEN}) and it has {images} "
                "images: write one mark for each image, or none"
            )
        shape: list[tuple[str, tuple[Part, ...]]] = []
        words: list[str] = []
        for turn in turns:
            texts = [turn.text] if turn.role != "user" else self._question_parts(turn.text)
            patterns = [None if text is None else _pattern(text, turn.role) for text in texts]
            shape.append((turn.role, tuple(found and found[0] for found in patterns)))
            words += [word for found in patterns if found is not None for word in found[1]]
        return tuple(shape), words

    def _question_parts(self, text: str) -> list[str | None]:
        """Return the parts of a question in order: texts, and None for each mark."""
        text = text.strip()
        in_front = _MARKS_IN_FRONT.match(text)
        marks = in_front[0].count(IMAGE_TOKEN) if in_front else 0
        first, *others = text[in_front.end() if in_front else 0 :].split(IMAGE_TOKEN)
        parts: list[str | None] = [*[None] * marks, first]
        for other in others:
            parts += [None, other]
        if self.template.puts_images_first and others:
            # The image leaves the end of the question, so the space before it is at the end.
            last = max(number for number, part in enumerate(parts) if part)
            parts[last] = str(parts[last]).rstrip()
        kept = [part for part in parts if part != ""]
        return kept if any(part is not None for part in kept) else [*kept, ""]

    def _pieces(self, conversation: Conversation, images: Sequence[str]) -> list[_Piece]:
        shape, texts = self._divide(conversation, len(images))
        words, placeholders, pieces = iter(texts), iter(images), []
        for segment in self.template.segments(shape):
            if segment.text is None:
                pieces.append(_Piece(next(words), segment.is_answer, "text"))
                continue
            for number, text in enumerate(segment.text.split(self.template.image_token)):
                if number:
                    pieces.append(_Piece(next(placeholders), False, "image"))
                pieces.append(_Piece(text, segment.is_answer, "fixed"))
        return pieces

    def _ids(self, pieces: Sequence[_Piece]) -> tuple[list[int], list[int]]:
        """Return L tokens, and for each the piece in which it begins, after the last if in none."""
        hides_marks = IMAGE_TOKEN in self.tokenizer.added_tokens_encoder and any(
            piece.kind == "text" and IMAGE_TOKEN in piece.text for piece in pieces
        )
        # An image of only special tokens is inserted afterwards, which is faster.
        images: dict[int, list[int]] = {}
        texts = []
        for number, piece in enumerate(pieces):
            text = piece.text
            image = self._placeholder_ids(text) if piece.kind == "image" else None
            if image is not None:
                images[number], text = image, self.template.image_token
            hides = hides_marks and piece.kind != "text"
            texts.append(text.replace(IMAGE_TOKEN, _HIDDEN_MARK) if hides else text)
        apart = next(n for n, piece in enumerate(pieces) if piece.is_answer)
        if not self.template.encodes_answers_apart:
            apart = len(texts)
        encoded, offsets = self._encoded("".join(texts[:apart]), hides_marks)
        if apart < len(texts):
            shift = sum(map(len, texts[:apart]))
            more, places = self._encoded("".join(texts[apart:]), hides_marks, is_start=False)
            encoded = encoded + more
            offsets = offsets + [(start + shift, end + shift) for start, end in places]
        ends = list(accumulate(map(len, texts)))
        ids: list[int] = []
        owners: list[int] = []
        for token, (start, end) in zip(encoded, offsets, strict=True):
            owner = len(texts) if start == end else bisect_right(ends, start)
            own = images.get(owner) or (token,)
            ids.extend(own)
            owners.extend([owner] * len(own))
        return ids, owners

    def _encoded(
        self, text: str, hides_marks: bool, is_start: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and offsets; ``hides_marks`` reads ``<image>`` as plain text."""
        begin = self.tokenizer.bos_token
        adds = is_start and not (begin and text.startswith(begin))
        if hides_marks:
            encoding = self._tokenizer_of_marks.encode(text, add_special_tokens=adds)
            return encoding.ids, encoding.offsets
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=adds)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _placeholder_ids(self, text: str) -> list[int] | None:
        """Return the tokens of an image if its first and last are special: no text joins them."""
        if text not in self._placeholders:
            if len(self._placeholders) == _KEPT_PLACEHOLDERS:
                self._placeholders.clear()
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            mark = self.tokenizer(self.template.image_token, add_special_tokens=False)["input_ids"]
            special = self.tokenizer.added_tokens_decoder
            is_special = bool(ids) and all(token in special for token in (*mark, ids[0], ids[-1]))
            self._placeholders[text] = ids if is_special and len(mark) == 1 else None
        return self._placeholders[text]

    @cached_property
    def _placeholders(self) -> dict[str, list[int] | None]:
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields alone: what was cached is made again in a loader's worker."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _limited(
        self, ids: list[int], pieces: Sequence[_Piece], owners: Sequence[int], in_training: bool
    ) -> EncodedConversation:
        """Cut a sample that is too long, or refuse it."""
        limit, labels = self.max_length, _labels(ids, pieces, owners)
        in_loss = [label != IGNORE_INDEX for label in labels]
        begins = [n for n in range(1, len(ids)) if in_loss[n] and not in_loss[n - 1]]
        images = {number for number, piece in enumerate(pieces) if piece.kind == "image"}
        last_image = max((n for n, owner in enumerate(owners) if owner in images), default=0)
        needed = max(begins[0 if in_training else -1], last_image) + 1
        if needed > limit:
            raise BadSample(
                f"its questions and images fill {needed - 1} tokens, and the model's max_length is "
                f"{limit}: raise it, or shorten them"
            )
        if in_training and self.too_long == "drop":
            raise BadSample(
                f"it has {len(ids)} tokens, more than the model's max_length {limit}: raise it, "
                "shorten the answer, or set too_long to 'cut' to learn the first tokens"
            )
        note = f"{len(ids) - limit} of its {len(ids)} tokens are beyond max_length {limit}"
        tokens, kept = torch.tensor(ids[:limit]), torch.tensor(labels[:limit])
        return EncodedConversation(tokens, kept, note if in_training else "")

    def _expect_no_reserved(self, tokens: Iterable[int]) -> None:
        found = sorted(self.reserved_ids.intersection(tokens))
        if found:
            named = ", ".join(repr(str(self.tokenizer.convert_ids_to_tokens(t))) for t in found[:3])
            raise BadSample(
                f"its text holds {named}, by which the model's format marks an end, a role or an "
                "image: write it in another way"
            )

    @cached_property
    def _tokenizer_of_marks(self) -> Any:
        """Backend tokenizer that reads ``<image>`` as text, and a hidden mark in its place."""
        backend = self.tokenizer.backend_tokenizer
        settings = json.loads(backend.to_str())
        for token in settings["added_tokens"]:
            if token["content"] == IMAGE_TOKEN:
                token["content"] = _HIDDEN_MARK
        vocabulary = settings["model"].get("vocab")
        if isinstance(vocabulary, dict) and IMAGE_TOKEN in vocabulary:
            vocabulary[_HIDDEN_MARK] = vocabulary.pop(IMAGE_TOKEN)
        elif isinstance(vocabulary, list):
            for entry in vocabulary:
                if entry[0] == IMAGE_TOKEN:
                    entry[0] = _HIDDEN_MARK
        settings["truncation"] = settings["padding"] = None
        return type(backend).from_str(json.dumps(settings))


def _labels(ids: Sequence[int], pieces: Sequence[_Piece], owners: Sequence[int]) -> list[int]:
    in_loss = [piece.is_answer for piece in pieces] + [False]
    return [t if in_loss[owner] else IGNORE_INDEX for t, owner in zip(ids, owners, strict=True)]


def _pattern(text: str, role: str) -> tuple[str, list[str]]:
    """Return a text with ``SLOT`` in place of its words, and the words.

    White space at its ends stays, which some templates leave out, and so do the tags of reasoning
    in an answer, at which some divide it.
    """
    pieces = _TAGS.split(text) if role == "assistant" else [text]
    pattern, words = "", []
    for number, piece in enumerate(pieces):
        core = piece.strip()
        if number % 2 or not core:
            pattern += piece
            continue
        start = piece.index(core)
        pattern += f"{piece[:start]}{SLOT}{piece[start + len(core) :]}"
        words.append(core)
    return (pattern, words) if words else (pattern + SLOT, [""])


def reserved_token_ids(processor: Any, config: Any, template: ChatTemplate) -> frozenset[int]:
    """Return the tokens of a model that have a role in its format and cannot be part of a text.

    They are the begin, the padding and the ends; the tokens in the template's fixed texts, without
    those of reasoning and tools; and all tokens of images, videos and sounds, by the names that
    processor, tokenizer and configuration give them and by their own.

    Args:
        processor: of transformers.
        config: configuration of the model.
        template: its chat template.
    """
    tokenizer, fixed = processor.tokenizer, template.fixed_texts
    found = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    found |= set(tokenizer.convert_tokens_to_ids(list(template.ends)))
    for number, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        is_control = token.special or (text[:1] in "<[" and text[-1:] in ">]")
        is_role = text in fixed and not _CONTENT_NAMES.search(text)
        if is_control and text.strip() and (is_role or _IMAGE_NAMES.search(text)):
            found.add(number)
    for owner in (processor, tokenizer):
        for name, value in vars(owner).items():
            if name.endswith("_token") and _IMAGE_NAMES.search(name) and isinstance(value, str):
                found.add(tokenizer.added_tokens_encoder.get(value))
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            found.add(value)
    # A word that ends an answer, in some models, is a word in a text.
    return frozenset(int(token) for token in found if token in tokenizer.added_tokens_decoder)
