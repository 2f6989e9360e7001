"""LLaVA-style instruction files: a JSON list (or JSON lines) of samples, read one by one.

Two layouts are in use and both are understood: ``{id, image, conversations}`` for training, and
``{question_id, image, text, answer}`` for test. The texts go into the shards as they are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmcl.core import PICTURE
from mmcl.data.dialogue import read_dialogue
from mmcl.data.faults import BadSample
from mmcl.data.reader import MAX_TEXT_BYTES


@dataclass(frozen=True)
class LlavaSample:
    """One sample of an instruction file.

    Attributes:
        name: its id as the file states it, "" where it has none.
        picture: path of its picture as the file states it, None for text alone.
        data: the ``.json`` member of a shard, UTF-8; see `mmcl.data.dialogue`.
    """

    name: str
    picture: str | None
    data: bytes


def read_records(path: Path) -> list[Any]:
    """Read an instruction file whole; it takes about four times its size in memory.

    Args:
        path: a JSON list, or one JSON value in every line; UTF-8, a byte order mark is skipped.

    Returns:
        The records, not looked at yet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, not JSON, not a list, or empty; place and reason are named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no instruction file {path}: correct the path")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at place {error.start}): "
            "save it as UTF-8"
        ) from None
    records = _lines(path, text) if _is_lines(path, text) else _parsed(path, text, "")
    records = [records] if isinstance(records, dict) else records
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds no samples: expected a list of them, or one in every line")
    return records


def _is_lines(path: Path, text: str) -> bool:
    """Tell whether a file holds a value in every line; it may be called .json all the same."""
    if path.suffix == ".jsonl" or not text.lstrip().startswith("{"):
        return path.suffix == ".jsonl"
    end = text.find("\n")
    return end >= 0 and text[:end].rstrip().endswith("}") and bool(text[end:].strip())


def _lines(path: Path, text: str) -> list[Any]:
    # Not splitlines(), which also cuts at characters that may stand inside a JSON text.
    numbered = enumerate(text.split("\n"), start=1)
    return [_parsed(path, line, f"line {number}, ") for number, line in numbered if line.strip()]


def _parsed(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not JSON ({where}{reason}): expected a list of samples, or one in every "
            "line"
        ) from None


def read_sample(raw: Any, answers: Sequence[str] = (), answer_field: str = "answer") -> LlavaSample:
    """Check one record and turn it into what a shard holds.

    Args:
        raw: the record.
        answers: all right answers where they are known from another file.
        answer_field: holds the right answer, or a list of them, in the test layout.

    Raises:
        BadSample: saying what is wrong with it.
    """
    if not isinstance(raw, Mapping):
        raise BadSample("it is not a mapping with 'image' and 'conversations'")
    right = list(answers) or _answers(raw.get(answer_field, raw.get("answers")))
    said = raw.get("conversations")
    member: dict[str, Any] = {
        "conversations": _asked(raw, right, answer_field) if said is None else _plain(said)
    }
    if right and (said is None or answers or len(right) > 1):
        member["answers"] = right
    picture = _picture(raw)
    _expect_marks(member["conversations"], picture)
    try:
        data = json.dumps(member, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadSample("its text holds half of a character (a lone surrogate)") from None
    if len(data) > MAX_TEXT_BYTES:
        raise BadSample(f"its texts have {len(data)} bytes, more than {MAX_TEXT_BYTES}")
    read_dialogue(data)
    name = raw.get("id", raw.get("question_id"))
    return LlavaSample("" if name is None else str(name), picture, data)


def _plain(said: Any) -> Any:
    """Keep who said what of every turn; what is no turn is left to the check."""
    if not isinstance(said, list):
        return said
    keys = ("from", "value")
    return [
        {key: turn.get(key) for key in keys} if isinstance(turn, dict) else turn for turn in said
    ]


def _asked(raw: Mapping[str, Any], right: Sequence[str], answer_field: str) -> list[Any]:
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


def _picture(raw: Mapping[str, Any]) -> str | None:
    if raw.get("video") is not None:
        raise BadSample("it shows a video")
    stated = raw.get("image", raw.get("images"))
    if isinstance(stated, list) and len(stated) > 1:
        raise BadSample(f"it shows {len(stated)} pictures: one is supported")
    if isinstance(stated, list):
        stated = stated[0] if stated else None
    if stated is not None and (not isinstance(stated, str) or not stated):
        raise BadSample(f"its 'image' is {str(stated)[:40]!r}, expected a path")
    return stated


def _expect_marks(said: Any, picture: str | None) -> None:
    """Check that turns, which may still be anything, show no more pictures than there are."""
    turns = said if isinstance(said, list) else []
    values = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    texts = [value for value in values if isinstance(value, str)]
    marks = sum(text.count(PICTURE) for text in texts)
    if marks > (picture is not None):
        has = "one" if picture is not None else "none"
        raise BadSample(f"its text shows {marks} pictures ({PICTURE}) and it has {has}")
