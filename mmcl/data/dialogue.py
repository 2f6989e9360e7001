"""Dialogues of samples: the ``.json`` member in the layout of LLaVA's files, checked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unicodedata import category

from mmcl.core import PICTURE, Dialogue, Turn
from mmcl.data.faults import BadSample

_SPEAKERS = {"human": "human", "user": "human", "gpt": "assistant", "assistant": "assistant"}
_NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
MAX_TURNS = 200


def read_dialogue(data: bytes) -> Dialogue:
    """Read ``{"conversations": [{"from": "human", "value": ...}, ...], "answers": [...]}``.

    Args:
        data: the whole member, UTF-8.

    Returns:
        turns that alternate, the human first; ``answers`` is the last turn's text unless stated.

    Raises:
        BadSample: saying what is wrong with it.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadSample(f"its dialogue (.json) is not JSON ({' '.join(str(error).split())})") from (
            None
        )
    said = raw.get("conversations") if isinstance(raw, dict) else None
    if not isinstance(said, list) or not 2 <= len(said) <= MAX_TURNS or len(said) % 2:
        count = len(said) if isinstance(said, list) else "no"
        raise BadSample(
            f"its dialogue has {count} turns, expected 'conversations' with an even number of "
            f"them, 2 to {MAX_TURNS}"
        )
    turns = tuple(_turn(turn, place) for place, turn in enumerate(said))
    return Dialogue(turns, _answers(raw.get("answers"), turns[-1].text))


def says_something(text: str) -> bool:
    """Tell whether there is more in a text than spaces, controls and marks that show nothing."""
    stripped = text.strip()
    return bool(stripped) and (
        stripped.isprintable() or any(category(mark) not in _NOT_SHOWN for mark in stripped)
    )


def templated(dialogue: Dialogue, template: str) -> Dialogue:
    """Return the dialogue with its first question put into a template.

    Args:
        dialogue: as recorded; a picture's mark in front of its question stays in front.
        template: with one ``{}``.
    """
    if template == "{}":
        return dialogue
    first = dialogue.turns[0]
    head, mark, question = first.text.rpartition(PICTURE)
    lead = question[: len(question) - len(question.lstrip())]
    asked = template.replace("{}", question.strip())
    return replace(
        dialogue,
        turns=(replace(first, text=f"{head}{mark}{lead}{asked}"), *dialogue.turns[1:]),
    )


def _turn(raw: Any, place: int) -> Turn:
    stated, text = (raw.get("from"), raw.get("value")) if isinstance(raw, dict) else (None, None)
    speaker = _SPEAKERS.get(stated) if isinstance(stated, str) else None
    wanted = "assistant" if place % 2 else "human"
    if speaker != wanted or not isinstance(text, str) or not says_something(text):
        raise BadSample(
            f"turn {place} of its dialogue is not a text from "
            f"{'gpt' if place % 2 else 'human'}: human and gpt take turns, human first"
        )
    _expect_characters(text)
    return Turn("assistant" if place % 2 else "human", text if place % 2 == 0 else text.strip())


def _answers(raw: Any, said: str) -> tuple[str, ...]:
    if raw is None:
        return (said,)
    if not isinstance(raw, list) or not raw or not all(isinstance(item, str) for item in raw):
        raise BadSample("its 'answers' are not a list of texts")
    kept = tuple(item for item in raw if says_something(item))
    _expect_characters("".join(kept))
    return kept or (said,)


def _expect_characters(text: str) -> None:
    # JSON can write half of a character, which no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadSample("its dialogue holds half of a character (a lone surrogate)") from None
