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
from mmcl.data.image_formats import MAX_IMAGES
from mmcl.data.shards.record_layouts import parse_record
from mmcl.data.stored_sample import MAX_TEXT_BYTES, BadSample, one_line

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS = ("human", "gpt")
_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"})
MAX_TURNS = 200
_ANSWER_FORMS = {
    "option": re.compile(r"\W*[A-Za-z]\W*|\s*(?:\([A-Za-z]\)|[A-Z][.):])\s*\S.*", re.DOTALL),
    # Four numbers in any form, as in [1, 2, 3, 4], (1,2),(3,4) or <loc0001><loc0002>...
    "box": re.compile(
        r"(?:.*?(?:<loc_?\d+>|(?<![\w.])(?:\d+(?:\.\d*)?|\.\d+)(?!\w))){4}.*", re.DOTALL
    ),
}
"""Scorer -> form of the reference answers that it accepts; other scorers accept any text."""
_Lookup = Callable[[int, Any], list[str]]
"""From (number of the record, record) to its reference answers; empty if there are none."""


def read_dialogue(data: bytes) -> Conversation:
    """Parse ``{"conversations": [{"from": "human", "value": ...}, ...], "answers": [...]}``.

    Returns:
        turns that alternate, the user first, behind a turn of the system if the first is one;
        ``answers`` is the last turn's text unless stated.

    Raises:
        BadSample: if it is not a conversation; the message says why.
    """
    try:
        raw = json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise BadSample(f"its conversation (.json) is not JSON ({one_line(error)})") from None
    raw_turns = raw.get("conversations") if isinstance(raw, dict) else None
    system = tuple(_system(turn) for turn in _first(raw_turns) if _is_system(turn))
    others = raw_turns[len(system) :] if isinstance(raw_turns, list) else []
    count = len(others)
    if not isinstance(raw_turns, list) or not 2 <= count <= MAX_TURNS or count % 2:
        raise BadSample(
            f"its conversation has {count if isinstance(raw_turns, list) else 'no'} turns"
            f"{' beside that of the system' * bool(system)}, "
            f"expected 'conversations' with an even number of them, 2 to {MAX_TURNS}"
        )
    turns = tuple(_turn(turn, index) for index, turn in enumerate(others))
    return Conversation((*system, *turns), _stated_answers(raw.get("answers"), turns[-1].text))


def _first(raw_turns: Any) -> list[Any]:
    return raw_turns[:1] if isinstance(raw_turns, list) else []


def _is_system(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("from") == "system"


def _system(raw: Any) -> Turn:
    text = raw.get("value")
    if not isinstance(text, str) or not has_visible_text(text):
        raise BadSample("the system turn of its conversation is not a text")
    _expect_whole_characters(text)
    return Turn("system", text)


def has_visible_text(text: str) -> bool:
    """Return whether a text has a visible character (no space, control or format character)."""
    stripped = text.strip()
    return bool(stripped) and (
        stripped.isprintable() or any(category(sign) not in _INVISIBLE for sign in stripped)
    )


def apply_template(dialogue: Conversation, template: str) -> Conversation:
    """Apply a template, with one ``{}``, to the first question of a conversation.

    Image tokens in front of the question stay in front.
    """
    if template == "{}":
        return dialogue
    place = next(index for index, turn in enumerate(dialogue.turns) if turn.role == "user")
    first = dialogue.turns[place]
    head, image_token, question = first.text.rpartition(IMAGE_TOKEN)
    if IMAGE_TOKEN in head and head.replace(IMAGE_TOKEN, "").strip():
        head, image_token, question = "", "", first.text  # tokens are inside of the question
    lead = question[: len(question) - len(question.lstrip())]
    prompt = template.replace("{}", question.strip())
    changed = replace(first, text=f"{head}{image_token}{lead}{prompt}")
    return replace(dialogue, turns=(*dialogue.turns[:place], changed, *dialogue.turns[place + 1 :]))


def _turn(raw: Any, index: int) -> Turn:
    stated, text = (raw.get("from"), raw.get("value")) if isinstance(raw, dict) else (None, None)
    role: Literal["user", "assistant"] = "assistant" if index % 2 else "user"
    is_role = isinstance(stated, str) and _ROLES.get(stated) == role
    if not is_role or not isinstance(text, str) or not has_visible_text(text):
        got = f", but from {stated[:20]!r}" if isinstance(stated, str) and not is_role else ""
        raise BadSample(
            f"turn {index} of its conversation is not a text from {_SPEAKERS[index % 2]}{got}: "
            "human and gpt take turns, human first, behind one turn of the system if there is one"
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
        images: of each image its path in the file, its bytes, base64 text or a mapping with
            ``bytes`` and ``path``; () for text alone.
        data: the ``.json`` member of a shard, UTF-8; see `mmcl.data.shards.llava_json`.
    """

    name: str
    images: tuple[Any, ...]
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
    parsed = parse_record(raw, answers, answer_field)
    member: dict[str, Any] = {"conversations": parsed.turns}
    if parsed.answers:
        member["answers"] = parsed.answers
    _expect_image_tokens(parsed.turns, len(parsed.images))
    try:
        data = json.dumps(member, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadSample("its text holds half of a character (a lone surrogate)") from None
    except (TypeError, ValueError) as error:
        raise BadSample(f"its turns cannot be stored as JSON ({one_line(error)})") from None
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"its texts have {len(data)} bytes, more than {MAX_TEXT_BYTES}")
    read_dialogue(data)
    return LlavaSample(record_id(raw), tuple(parsed.images), data)


def record_id(raw: Any) -> str:
    """Return the id of a record as a text, "" if it has none or is no mapping.

    Raises:
        BadSample: if it is a list or a mapping.
    """
    stated = raw.get("id", raw.get("question_id")) if isinstance(raw, Mapping) else None
    if isinstance(stated, list | Mapping):
        raise BadSample(f"its id is {str(stated)[:40]!r}, expected a text or a number")
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


def _expect_image_tokens(turns: Any, images: int) -> None:
    """Check that turns, which may still be anything, show all images or have no image token."""
    if images > MAX_IMAGES:
        raise BadSample(f"it has {images} images, more than {MAX_IMAGES}")
    listed = turns if isinstance(turns, list) else []
    values = [
        turn.get("value")
        for turn in listed
        if isinstance(turn, dict) and turn.get("from") in ("human", "user")
    ]
    tokens = sum(value.count(IMAGE_TOKEN) for value in values if isinstance(value, str))
    if tokens not in (0, images):
        has = {0: "no image", 1: "one image"}.get(images, f"{images} images")
        raise BadSample(f"its text has {tokens} image tokens ({IMAGE_TOKEN}) and it has {has}")
