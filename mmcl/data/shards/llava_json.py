"""LLaVA-style JSON: records, the ``.json`` member that they become, and its conversation."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from unicodedata import category

from mmcl.core import IMAGE_TOKEN, Conversation, Turn
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, one_line

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
MAX_TURNS = 200
_ANSWER_FORMS = {
    "option": re.compile(r"\W*[A-Za-z]\W*"),
    "box": re.compile(
        r"[^\d]*(?:\d+(?:\.\d*)?|\.\d+)(?:\s*,\s*-?(?:\d+(?:\.\d*)?|\.\d+)){3}[^\d]*"
    ),
}
"""Scorer -> form of the reference answers that it accepts; other scorers accept any text."""
_Lookup = Callable[[int, Any], list[str]]
"""From (number of the record, record) to its reference answers; empty if there are none."""


def read_dialogue(data: bytes) -> Conversation:
    """Parse ``{"conversations": [{"from": "human", "value": ...}, ...], "answers": [...]}``.

    Returns:
        turns that alternate, the user first; ``answers`` is the last turn's text unless stated.

    Raises:
        BadSample: if it is not a conversation; the message says why.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadSample(f"its conversation (.json) is not JSON ({one_line(error)})") from None
    raw_turns = raw.get("conversations") if isinstance(raw, dict) else None
    count = len(raw_turns) if isinstance(raw_turns, list) else 0
    if not isinstance(raw_turns, list) or not 2 <= count <= MAX_TURNS or count % 2:
        raise BadSample(
            f"its conversation has {count if isinstance(raw_turns, list) else 'no'} turns, "
            f"expected 'conversations' with an even number of them, 2 to {MAX_TURNS}"
        )
    turns = tuple(_turn(turn, index) for index, turn in enumerate(raw_turns))
    return Conversation(turns, _stated_answers(raw.get("answers"), turns[-1].text))


def has_visible_text(text: str) -> bool:
    """Return whether a text has a visible character (no space, control or format character)."""
    stripped = text.strip()
    return bool(stripped) and (
        stripped.isprintable() or any(category(sign) not in _INVISIBLE for sign in stripped)
    )


def apply_template(dialogue: Conversation, template: str) -> Conversation:
    """Apply a template, with one ``{}``, to the first question of a conversation.

    An image token in front of the question stays in front.
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
    role: Literal["user", "assistant"] = "assistant" if index % 2 else "user"
    is_role = isinstance(stated, str) and _ROLES.get(stated) == role
    if not is_role or not isinstance(text, str) or not has_visible_text(text):
        raise BadSample(
            f"turn {index} of its conversation is not a text from "
            f"{'gpt' if index % 2 else 'human'}: human and gpt take turns, human first"
        )
    _expect_whole_characters(text)
    return Turn(role, text.strip() if index % 2 else text)


def _stated_answers(raw: Any, last: str) -> tuple[str, ...]:
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


@dataclass(frozen=True)
class LlavaSample:
    """One sample of an instruction file.

    Attributes:
        name: its id in the file, "" if it has none.
        image: path of its image in the file, None for text alone.
        data: the ``.json`` member of a shard, UTF-8; see `mmcl.data.shards.llava_json`.
    """

    name: str
    image: str | None
    data: bytes


def read_sample(raw: Any, answers: Sequence[str] = (), answer_field: str = "answer") -> LlavaSample:
    """Check one instruction record and convert it to the content of a shard.

    Args:
        raw: the record.
        answers: all reference answers, if they are known from another file.
        answer_field: key of the right answer, or of a list of them, in the test layout.

    Raises:
        BadSample: saying what is wrong with it.
    """
    if not isinstance(raw, Mapping):
        raise BadSample("it is not a mapping with 'image' and 'conversations'")
    right = list(answers) or _answers(raw.get(answer_field, raw.get("answers")))
    turns = raw.get("conversations")
    member: dict[str, Any] = {
        "conversations": _from_question(raw, right, answer_field)
        if turns is None
        else _plain_turns(turns)
    }
    if right and (turns is None or answers or len(right) > 1):
        member["answers"] = right
    image = _image(raw)
    _expect_image_tokens(member["conversations"], image)
    try:
        data = json.dumps(member, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadSample("its text holds half of a character (a lone surrogate)") from None
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"its texts have {len(data)} bytes, more than {MAX_TEXT_BYTES}")
    read_dialogue(data)
    return LlavaSample(record_id(raw), image, data)


def record_id(raw: Any) -> str:
    """Return the id of a record, "" if it has none or is no mapping."""
    stated = raw.get("id", raw.get("question_id")) if isinstance(raw, Mapping) else None
    return "" if stated is None else str(stated)


def expect_scorable(data: bytes, scorer: str) -> None:
    """Check that a scorer accepts the reference answers of a sample's ``.json`` member.

    Raises:
        BadSample: if an answer is not of the scorer's form.
    """
    form = _ANSWER_FORMS.get(scorer.partition("/")[0])  # may state its version, as in box/1
    if form is None:
        return
    for answer in read_dialogue(data).answers:
        if not form.fullmatch(answer):
            raise BadSample(
                f"its right answer is {answer[:40]!r}, which the scorer '{scorer}' cannot use"
            )


@dataclass(frozen=True)
class ReferenceFile:
    """File of reference answers; picklable, parsed once in each process.

    Attributes:
        path: of the file.
        time_ns: modification time when it was opened.
    """

    path: Path
    time_ns: int

    def answers(self, number: int, raw: Any) -> list[str]:
        """Return all reference answers of a record of the instruction file, counted from 0.

        Raises:
            BadSample: if the file has none.
            RuntimeError: if the file changed since it was opened.
        """
        found = _parse_references(self)(number, raw)
        if not found:
            raise BadSample("its right answers are not in the file of references")
        return found


def open_references(path: Path) -> ReferenceFile:
    """Open a file with the reference answers of an instruction file's questions.

    Two layouts are understood. COCO's captions, ``{images: [{id, file_name}], annotations:
    [{image_id, caption}]}``, are found by the image's file name; without file names image n is
    the n-th question. TextVQA's ``{data: [{question_id, answers}]}`` is found by the question id.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or in neither layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of references {path}: correct the path")
    file = ReferenceFile(path, path.stat().st_mtime_ns)
    _parse_references(file)
    return file


@lru_cache(maxsize=2)
def _parse_references(file: ReferenceFile) -> _Lookup:
    if file.path.stat().st_mtime_ns != file.time_ns:
        raise RuntimeError(f"{file.path} changed while it was read: start again")
    try:
        content = json.loads(file.path.read_bytes().decode("utf-8-sig"))
        if isinstance(content, Mapping) and "annotations" in content:
            return _coco_captions(content)
        if isinstance(content, Mapping) and "data" in content:
            return _textvqa_answers(content["data"])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.path} is not JSON in UTF-8 ({one_line(error)}): save it again"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file.path} is broken: {type(error).__name__} {error}") from None
    raise ValueError(
        f"{file.path} holds no reference answers: expected 'images' and 'annotations' as in COCO's "
        "captions, or 'data' as in TextVQA"
    )


def _coco_captions(content: Mapping[str, Any]) -> _Lookup:
    captions: dict[Any, list[str]] = {}
    for one in content["annotations"]:
        captions.setdefault(one["image_id"], []).append(str(one["caption"]))
    ids = {
        posixpath.basename(one["file_name"]): one["id"]
        for one in content.get("images", ())
        if "file_name" in one
    }

    def find(number: int, raw: Any) -> list[str]:
        stated = raw.get("image") if isinstance(raw, Mapping) else None
        name = posixpath.basename(stated) if isinstance(stated, str) else ""
        return captions.get(ids.get(name) if ids else number + 1, [])

    return find


def _textvqa_answers(data: Any) -> _Lookup:
    answers = {str(one["question_id"]): [str(text) for text in one["answers"]] for one in data}

    def find(number: int, raw: Any) -> list[str]:
        name = raw.get("question_id", raw.get("id")) if isinstance(raw, Mapping) else None
        return answers.get(str(name), [])

    return find


def _plain_turns(turns: Any) -> Any:
    """Keep role and text of every turn; what is no turn is left to `read_dialogue`."""
    if not isinstance(turns, list):
        return turns
    keys = ("from", "value")
    return [
        {key: turn.get(key) for key in keys} if isinstance(turn, dict) else turn for turn in turns
    ]


def _from_question(raw: Mapping[str, Any], right: Sequence[str], answer_field: str) -> list[Any]:
    """Return the two turns of a record in the test layout."""
    text = raw.get("text")
    if not isinstance(text, str):
        raise BadSample("it has neither 'conversations' nor a 'text'")
    if not right:
        raise BadSample(f"it has no right answer ('{answer_field}')")
    return [{"from": "human", "value": text}, {"from": "gpt", "value": right[0]}]


def _answers(stated: Any) -> list[str]:
    """Return the right answers of a record: a text, a number, or a list of such."""
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise BadSample("its right answers are not texts")
    return [str(text) for text in texts]


def _image(raw: Mapping[str, Any]) -> str | None:
    if raw.get("video") is not None:
        raise BadSample("it has a video, which is not supported")
    stated = raw.get("image", raw.get("images"))
    if isinstance(stated, list) and len(stated) > 1:
        raise BadSample(f"it has {len(stated)} images: one is supported")
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    if stated is not None and (not isinstance(stated, str) or not stated):
        raise BadSample(f"its 'image' is {str(stated)[:40]!r}, expected a path")
    return stated


def _expect_image_tokens(turns: Any, image: str | None) -> None:
    """Check that turns, which may still be anything, have no more image tokens than images."""
    listed = turns if isinstance(turns, list) else []
    values = [turn.get("value") for turn in listed if isinstance(turn, dict)]
    tokens = sum(value.count(IMAGE_TOKEN) for value in values if isinstance(value, str))
    if tokens > (image is not None):
        has = "one image" if image is not None else "no image"
        raise BadSample(f"its text has {tokens} image tokens ({IMAGE_TOKEN}) and it has {has}")
