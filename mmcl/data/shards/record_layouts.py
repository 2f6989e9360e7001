"""Layouts of instruction records in the field: turns, images and answers of each of them.

LLaVA's and ShareGPT's ``conversations``, OpenAI's and Hugging Face's ``messages`` (also with parts
of text and image), TRL's ``prompt`` and ``completion`` as lists of such messages, the_cauldron's
``texts``, ``query``/``response``/``history`` as in ms-swift, ``instruction``/``input``/``output``
as in Alpaca, LLaVA's and POPE's questions (``text``), and questions with options as in VLMEvalKit's
tables, ScienceQA and MMMU. All become LLaVA's turns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmcl.core import IMAGE_TOKEN
from mmcl.data.question_options import (
    HINT_KEYS,
    OPTION_KEYS,
    choose_only,
    first_key,
    first_of,
    format_question,
    is_absent,
    listed_values,
    option_keys,
    read_options,
)
from mmcl.data.stored_sample import BadSample

TURN_KEYS = ("conversations", "conversation", "messages", "texts")
"""Keys of a list of turns; the first that a record has counts."""
PROMPT_KEYS = ("prompt", "completion")
"""Keys of the turns before the answer, and of the answer, as lists of turns."""
IMAGE_KEYS = (
    "image", "images", "image_path", "image_paths", "image_file", "img", "img_path", "file_name",
)  # fmt: skip
SYSTEM_KEYS = ("system", "system_prompt")
QUESTION_KEYS = ("question", "query", "prompt", "instruction")
ANSWER_KEYS = (
    "answer", "multiple_choice_answer", "response", "completion", "output", "answers",
    "correct_answer", "correct_choice_idx", "answer_index", "answer_idx",
)  # fmt: skip
MEDIA_KEYS = ("video", "videos", "audio", "audios")
"""Keys of what no model here takes."""
_ROLES = {
    "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "model": "gpt",
    "system": "system",
}  # fmt: skip
_TAGGED = re.compile(r"<img>([^<>\n]+)</img>")
"""Image in a text of Qwen-VL."""
_NUMBERED = re.compile(r"<image ([0-9]{1,2})>")
"""Image in a question of MMMU, from 1."""
_PART_IMAGES = ("image", "image_url", "path", "url", "file", "file_path", "image_path")


@dataclass
class ParsedRecord:
    """Turns of a record as LLaVA has them, ``{"from": ..., "value": ...}``, images and answers.

    Attributes:
        turns: as stated; `read_dialogue` checks them.
        images: paths, addresses, base64 texts, bytes, or mappings with ``bytes`` and ``path``, in
            the order of the image tokens of the questions.
        answers: reference answers that the record states beside its turns.
    """

    turns: Any
    images: list[Any]
    answers: list[str] = field(default_factory=list)


def has_turns(raw: Mapping[str, Any]) -> bool:
    """Return whether a record states its turns as a list of mappings, or as the JSON of one."""
    stated = first_of(raw, TURN_KEYS)
    listed = listed_values(stated)
    return (
        has_prompt_turns(raw)
        or first_key(raw, TURN_KEYS) in ("conversations", "messages")
        or (bool(listed) and all(isinstance(turn, Mapping) for turn in listed))
    )


def has_prompt_turns(raw: Mapping[str, Any]) -> bool:
    """Return whether a record states its turns as lists of messages, prompt and completion."""
    lists = [listed_values(raw.get(key)) for key in PROMPT_KEYS]
    return not first_key(raw, TURN_KEYS) and all(
        own and all(isinstance(turn, Mapping) for turn in own) for own in lists
    )


def is_instruction(raw: Mapping[str, Any]) -> bool:
    """Return whether a record is of a layout whose turns need no column names to be found."""
    pairs = (("query", "response"), ("instruction", "output"))
    has_dialogue = any(key in raw and answer in raw for key, answer in pairs)
    return has_turns(raw) or has_dialogue


def parse_record(
    raw: Mapping[str, Any], references: Sequence[str] = (), answer_field: str = "answer"
) -> ParsedRecord:
    """Read the turns, images and answers of a record in any of the layouts.

    Args:
        raw: the record.
        references: all reference answers, if they are known from another file.
        answer_field: key of the right answer, or of a list of them, of a question.

    Raises:
        BadSample: if it is in none of them, or holds what is not supported.
    """
    for key in MEDIA_KEYS:
        if not is_absent(raw.get(key)):
            raise BadSample(
                f"it has {'an' if key[0] == 'a' else 'a'} {key.removesuffix('s')}, which is not "
                f"supported: give --ignore_columns {key} if it is not needed"
            )
    images = record_images(raw)
    if has_turns(raw):
        parsed = _listed_turns(raw, images)
        right = list(references) or read_answers(raw.get(answer_field, raw.get("answers")))
        parsed.answers = right if references or len(right) > 1 else []
    else:
        parsed = _stated_question(raw, references, answer_field, images)
    _add_system(raw, parsed)
    _expect_no_placeholders(raw, parsed.turns)
    return parsed


def record_images(raw: Mapping[str, Any]) -> list[Any]:
    """Return the images that a record states beside its turns.

    Raises:
        BadSample: if ``image`` and ``images`` differ, or an entry of a list is empty.
    """
    key = first_key(raw, IMAGE_KEYS)
    if not key:
        return []
    images = _images(raw[key])
    if key == "image" and not is_absent(raw.get("images")) and _images(raw["images"]) != images:
        raise BadSample("its 'image' and 'images' differ: leave one out with --ignore_columns")
    for image in images:
        if is_absent(image) or not isinstance(image, str | bytes | bytearray | Mapping):
            raise BadSample(f"its '{key}' is {str(image)[:40]!r}, expected a path")
    return images


def _images(stated: Any) -> list[Any]:
    return listed_values(stated) or [stated]


def read_answers(stated: Any) -> list[str]:
    """Return the right answers of a record: a text, a number, or a list of such."""
    listed = stated if isinstance(stated, list) else [] if stated is None else [stated]
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
    if not all(isinstance(text, str | int | float) for text in texts):
        raise BadSample("its right answers are not texts")
    return [str(text) for text in texts]


def _listed_turns(raw: Mapping[str, Any], images: list[Any]) -> ParsedRecord:
    """Read a list of turns: from/value, role/content or user/assistant."""
    stated = first_of(raw, TURN_KEYS)
    if has_prompt_turns(raw):
        stated = [turn for key in PROMPT_KEYS for turn in listed_values(raw[key])]
    turns = listed_values(stated) if isinstance(stated, str) else stated
    if isinstance(stated, str) and not turns:
        return ParsedRecord(stated, images)
    if not isinstance(turns, list | tuple):
        return ParsedRecord(turns, images)
    plain: list[Any] = []
    slots: list[Any] = []
    for turn in turns:
        if isinstance(turn, Mapping) and "user" in turn and "assistant" in turn:
            plain += [
                {"from": "human", "value": turn["user"]},
                {"from": "gpt", "value": turn["assistant"]},
            ]
        elif isinstance(turn, Mapping):
            plain.append(_turn(turn, slots))
        else:
            plain.append(turn)
    if plain and isinstance(plain[0], dict) and plain[0]["from"] == "system":
        plain = plain[1:] if is_absent(plain[0]["value"]) else plain
    return ParsedRecord(plain, _in_order(slots, images))


def _turn(turn: Mapping[str, Any], slots: list[Any]) -> dict[str, Any]:
    """Return a turn as LLaVA has it; ``slots`` gets what its parts say of each of its images."""
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    known = _ROLES.get(role, role) if isinstance(role, str) else role
    if isinstance(content, list | tuple):
        texts = []
        for part in content:
            text, image = _part(part)
            if image is not None and known != "human":
                raise BadSample(f"a turn of its {role} shows an image, only questions may")
            slots += [_NEXT] * (text.count(IMAGE_TOKEN) if known == "human" else 0)
            slots += [] if image is None else [image]
            texts.append(text if image is None else IMAGE_TOKEN)
        content = "".join(texts)
    elif isinstance(content, str) and known == "human":
        places = re.findall(f"{_TAGGED.pattern}|{IMAGE_TOKEN}", content)
        slots += [path or _NEXT for path in places]
        content = _TAGGED.sub(IMAGE_TOKEN, content)
    # LLaVA's own turns are kept to the letter.
    return {"from": role if "from" in turn else known, "value": content}


_NEXT = object()
"""Place of an image that the record lists elsewhere, in order."""


def _part(part: Any) -> tuple[str, Any]:
    """Return the text of a part of a content, and its image: a path, a number, or ``_NEXT``."""
    if isinstance(part, str):
        return part, None
    if not isinstance(part, Mapping):
        raise BadSample(f"its content has the part {str(part)[:40]!r}, expected text or image")
    kind = part.get("type")
    stated = first_of(part, _PART_IMAGES)
    if kind in ("text", "input_text", "output_text") or (kind is None and stated is None):
        if not isinstance(part.get("text"), str):
            raise BadSample(f"its content has the part {str(dict(part))[:60]!r} without a text")
        return part["text"], None
    if kind not in (None, "image", "image_url", "input_image"):
        raise BadSample(
            f"its content has a part of type {str(kind)[:40]!r}: text and image are supported"
        )
    if isinstance(stated, Mapping) and "url" in stated:
        stated = stated["url"]
    if stated is not None:
        return "", stated
    index = part.get("index")
    return "", index if isinstance(index, int) and not isinstance(index, bool) else _NEXT


def _in_order(slots: Sequence[Any], images: list[Any]) -> list[Any]:
    """Return the images in the order of their places: stated there, by number, or the next."""
    if all(slot is _NEXT for slot in slots):
        return images
    left, found = list(images), list[Any]()
    for slot in slots:
        if isinstance(slot, int):
            if not 0 <= slot < len(images):
                raise BadSample(f"its content shows image {slot}, and it has {len(images)}")
            found.append(images[slot])
        elif slot is not _NEXT:
            found.append(slot)
        elif left:
            found.append(left.pop(0))
        else:
            raise BadSample(f"its content shows {len(slots)} images and it has {len(images)}")
    if any(not any(image is own or image == own for own in found) for image in left):
        raise BadSample(f"its content shows {len(slots)} images and it lists {len(images)} more")
    return found


def _stated_question(
    raw: Mapping[str, Any], references: Sequence[str], answer_field: str, images: list[Any]
) -> ParsedRecord:
    """Read a record of a question and an answer, with turns before it and options if it has any."""
    # LLaVA's own questions are kept to the letter.
    is_plain = isinstance(raw.get("text"), str)
    question = raw["text"] if is_plain else _plain_question(raw)
    key = _answer_key(raw, answer_field)
    right = list(references) or read_answers(raw.get(key))
    if not right:
        raise BadSample(
            f"it has no right answer ('{answer_field}'): --answer_field names another key of JSON"
        )
    if not is_plain and not isinstance(raw.get(key), list):
        right = [text.strip() for text in right]
    options = read_options(raw)
    if options:
        right = [choose_only(raw, options, listed_values(raw.get(key)) or [raw.get(key)])]
    question = format_question(question, raw.get(first_key(raw, HINT_KEYS)), options)
    question, images = _by_number(question, images)
    turns = _history(raw.get("history"))
    turns += [{"from": "human", "value": question}, {"from": "gpt", "value": right[0]}]
    return ParsedRecord(turns, images, right)


def _answer_key(raw: Mapping[str, Any], answer_field: str) -> str:
    """Return the key of the right answer: POPE's is ``label``, which is a number elsewhere."""
    key = first_key(raw, tuple(dict.fromkeys((answer_field, *ANSWER_KEYS))))
    return key or ("label" if isinstance(raw.get("label"), str) else "")


def _plain_question(raw: Mapping[str, Any]) -> str:
    """Return the question of a record, and what Alpaca's ``input`` adds to it."""
    key = first_key(raw, QUESTION_KEYS)
    question = raw.get(key)
    if question is None:
        raise BadSample("it has neither 'conversations' nor a 'text'")
    if not isinstance(question, str | int | float):
        raise BadSample(f"its question is a {type(question).__name__}, expected a text")
    more = raw.get("input") if key == "instruction" else None
    return "\n".join([str(question).strip(), *([] if is_absent(more) else [str(more).strip()])])


def _by_number(question: str, images: list[Any]) -> tuple[str, list[Any]]:
    """Return a question with its numbered images, ``<image 2>``, marked in order, and these."""
    numbers = [int(number) for number in _NUMBERED.findall(question)] if images else []
    if not numbers:
        return question, images
    if set(numbers) != set(range(1, len(images) + 1)):
        shown = ", ".join(map(str, sorted(set(numbers))))
        raise BadSample(f"its question shows the images {shown} and it has {len(images)}")
    return _NUMBERED.sub(IMAGE_TOKEN, question), [images[number - 1] for number in numbers]


def _history(stated: Any) -> list[dict[str, Any]]:
    """Return the turns before a question: pairs of a question and an answer."""
    if is_absent(stated):
        return []
    turns: list[dict[str, Any]] = []
    for pair in listed_values(stated) or [stated]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadSample("its 'history' is not a list of pairs of a question and an answer")
        turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
    return turns


def _add_system(raw: Mapping[str, Any], parsed: ParsedRecord) -> None:
    """Put the system prompt of a record in front of its turns."""
    key = first_key(raw, SYSTEM_KEYS)
    if not key or not isinstance(parsed.turns, list):
        return
    first = parsed.turns[0] if parsed.turns else None
    if isinstance(first, dict) and first.get("from") == "system":
        if first["value"] == raw[key]:
            return
        raise BadSample(f"it has '{key}' and a system turn: leave one of them out")
    parsed.turns.insert(0, {"from": "system", "value": raw[key]})


def _expect_no_placeholders(raw: Mapping[str, Any], turns: Any) -> None:
    """Refuse texts with places that ms-swift fills from ``objects``."""
    if is_absent(raw.get("objects")) or not isinstance(turns, list):
        return
    texts = "".join(str(turn.get("value")) for turn in turns if isinstance(turn, dict))
    for mark in ("<bbox>", "<ref-object>"):
        if mark in texts:
            raise BadSample(
                f"its text has {mark}, to be filled from 'objects', which is not supported: write "
                "names and boxes into the text"
            )


def used_keys(raw: Mapping[str, Any], answer_field: str = "answer") -> set[str]:
    """Return the keys that `parse_record` reads of a record, whether it has them or not."""
    used = {
        "id", "question_id", "image", "images", "answer", "answers", answer_field, *MEDIA_KEYS,
        first_key(raw, IMAGE_KEYS), first_key(raw, SYSTEM_KEYS),
    }  # fmt: skip
    if has_turns(raw):
        return {*used, *(PROMPT_KEYS if has_prompt_turns(raw) else [first_key(raw, TURN_KEYS)])}
    options = first_key(raw, OPTION_KEYS)
    letters = [] if options else option_keys(raw).values()
    question = "text" if isinstance(raw.get("text"), str) else first_key(raw, QUESTION_KEYS)
    return {
        *used, *letters, options, question, "history", "input" if question == "instruction" else "",
        _answer_key(raw, answer_field), first_key(raw, HINT_KEYS),
    }  # fmt: skip


def keyed_record(key: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of a mapping of ids to records, with its id.

    ScienceQA states only the names of images, which are in a folder of the split and the id.
    """
    record = {"id": key, **raw}
    image, split = raw.get("image"), raw.get("split")
    if isinstance(image, str) and isinstance(split, str) and image and "/" not in image:
        record["image"] = f"{split}/{key}/{image}"
    return record


def question_keys_of(keys: Collection[str]) -> dict[str, str]:
    """Return use -> the key that `parse_record` reads for it, of a question's record."""
    uses = {
        "question": QUESTION_KEYS, "answer": ANSWER_KEYS, "path": IMAGE_KEYS, "hint": HINT_KEYS,
        "options": OPTION_KEYS, "system": SYSTEM_KEYS,
    }  # fmt: skip
    found = {use: next((key for key in names if key in keys), "") for use, names in uses.items()}
    return {use: key for use, key in found.items() if key}
