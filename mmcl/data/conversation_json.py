"""ChatTokenizer of a sample: the ``.json`` member in the layout of LLaVA's files, checked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unicodedata import category

from mmcl.core import IMAGE_TOKEN, Conversation, Turn
from mmcl.data.errors import BadSample

_SPEAKERS = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
MAX_TURNS = 200


def read_dialogue(data: bytes) -> Conversation:
    """Parse ``{"conversations": [{"from": "human", "value": ...}, ...], "answers": [...]}``.

    Args:
        data: the whole member, UTF-8.

    Returns:
        turns that alternate, the human first; ``answers`` is the last turn's text unless stated.

    Raises:
        BadSample: if it is not a conversation; the message says why.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise BadSample(f"its conversation (.json) is not JSON ({reason})") from None
    raw_turns = raw.get("conversations") if isinstance(raw, dict) else None
    count = len(raw_turns) if isinstance(raw_turns, list) else 0
    if not isinstance(raw_turns, list) or not 2 <= count <= MAX_TURNS or count % 2:
        raise BadSample(
            f"its conversation has {count if isinstance(raw_turns, list) else 'no'} turns, "
            f"expected 'conversations' with an even number of them, 2 to {MAX_TURNS}"
        )
    turns = tuple(_turn(turn, index) for index, turn in enumerate(raw_turns))
    return Conversation(turns, _answers(raw.get("answers"), turns[-1].text))


def has_visible_text(text: str) -> bool:
    """Return whether a text has a visible character (no space, control or format character)."""
    stripped = text.strip()
    return bool(stripped) and (
        stripped.isprintable() or any(category(sign) not in _INVISIBLE for sign in stripped)
    )


def apply_template(dialogue: Conversation, template: str) -> Conversation:
    """Apply a template to the first question of a conversation.

    Args:
        dialogue: as recorded; an image token in front of its question stays in front.
        template: with one ``{}``.
    """
    if template == "{}":
        return dialogue
    first = dialogue.turns[0]
    head, image_token, question = first.text.rpartition(IMAGE_TOKEN)
    lead = question[: len(question) - len(question.lstrip())]
    prompt = template.replace("{}", question.strip())
    return replace(
        dialogue,
        turns=(replace(first, text=f"{head}{image_token}{lead}{prompt}"), *dialogue.turns[1:]),
    )


def _turn(raw: Any, index: int) -> Turn:
    stated, text = (raw.get("from"), raw.get("value")) if isinstance(raw, dict) else (None, None)
    speaker = _SPEAKERS.get(stated) if isinstance(stated, str) else None
    wanted = "assistant" if index % 2 else "human"
    if speaker != wanted or not isinstance(text, str) or not has_visible_text(text):
        raise BadSample(
            f"turn {index} of its conversation is not a text from "
            f"{'gpt' if index % 2 else 'human'}: human and gpt take turns, human first"
        )
    _expect_whole_characters(text)
    return Turn("assistant" if index % 2 else "human", text if index % 2 == 0 else text.strip())


def _answers(raw: Any, last: str) -> tuple[str, ...]:
    if raw is None:
        return (last,)
    if not isinstance(raw, list) or not raw or not all(isinstance(item, str) for item in raw):
        raise BadSample("its 'answers' are not a list of texts")
    kept = tuple(item for item in raw if has_visible_text(item))
    _expect_whole_characters("".join(kept))
    return kept or (last,)


def _expect_whole_characters(text: str) -> None:
    # JSON can write half of a character, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("its conversation holds half of a character (a lone surrogate)") from None
