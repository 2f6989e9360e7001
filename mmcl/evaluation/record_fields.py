"""Fields of a record of another program: its name, question, options and right answers.

``read_records`` reads the records, ``read_foreign`` makes predictions of them.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Mapping, Sequence
from typing import Any

from mmcl.evaluation import strict_json
from mmcl.evaluation.record_files import ID_KEYS, name_keys

RIGHT_KEYS = (
    "target", "targets", "answer", "gt_answer", "multiple_choice_answer", "label", "labels",
    "ground_truth", "gt", "gold", "reference", "references", "correct_answer", "annotation",
    "answers", "gt_answers",
)  # fmt: skip
ANNOTATOR_KEYS = ("answers", "gt_answers")
_OPTION_LISTS = ("choices", "options")
_ASSISTANT = ("gpt", "assistant", "model")
_QUESTIONS = ("question", "query", "prompt", "text", "input")


def sample_name(raw: Mapping[str, Any], where: str) -> str:
    """Return the name of a record's sample.

    Raises:
        ValueError: naming the place, if the record has none.
    """
    name = next((raw[key] for key in ID_KEYS if key in raw), None)
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"{where} has question_id {name!r}: expected a number or a text")
    return str(name)


def prediction_text(value: object, where: str, key: str) -> str:
    """Return a prediction, the first of a list of texts.

    Raises:
        ValueError: naming the place, if it is neither a text nor a number.
    """
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} has {key} {value!r}: expected the prediction")
    return plain_value(value)


def question_text(raw: Mapping[str, Any]) -> str:
    """Return the question of a record, or of the last user turn of its conversation."""
    turns = [turn for turn in _turns(raw) if _role(turn) not in _ASSISTANT]
    found = [turns[-1].get("value", turns[-1].get("content"))] if turns else []
    found += [raw[key] for key in _QUESTIONS if isinstance(raw.get(key), str)]
    question = found[0] if found else ""
    return question.replace("<image>", "").strip() if isinstance(question, str) else ""


def right_answers(raw: Mapping[str, Any], where: str, annotators: bool) -> tuple[str, ...]:
    """Return all right answers of a record; the number of an option becomes its letter.

    Args:
        raw: the record.
        where: its place, for errors.
        annotators: prefer the answers of all annotators to the one that was agreed on.

    Raises:
        ValueError: naming the place and the keys, if the record has none.
    """
    order = (*ANNOTATOR_KEYS, *RIGHT_KEYS) if annotators else RIGHT_KEYS
    right = next((raw[key] for key in order if raw.get(key) is not None), None)
    if right is None:
        turns = [turn for turn in _turns(raw) if _role(turn) in _ASSISTANT]
        right = [turn.get("value", turn.get("content")) for turn in turns][-1:]
    options = record_options(raw)
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(options):
        right = list(options)[right]  # ScienceQA counts its choices from 0
    # Four numbers are one box, any other list holds alternatives.
    is_box = isinstance(right, list) and len(right) == 4 and all(map(strict_json.is_number, right))
    texts = [str(right)] if is_box else _alternatives(right)
    if not texts or not all(texts):
        raise ValueError(
            f"{where} has no right answer: expected 'answer' (a text or a list of texts) or "
            f"'conversations' that end with a turn of gpt, and its keys are {name_keys(raw)}"
        )
    return tuple(texts)


def _alternatives(value: object) -> list[str]:
    if isinstance(value, list):
        return [text for each in value for text in _alternatives(each)]
    return [plain_value(value)]


def plain_value(value: object) -> str:
    """Return a text or a number as text; VQA's lists hold {"answer": text} per annotator."""
    if isinstance(value, dict):
        value = value.get("answer")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    is_scalar = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    return str(value) if is_scalar else ""


def record_options(raw: Mapping[str, Any]) -> dict[str, str]:
    """Return the options of a multiple choice, letter -> text.

    They are a list, a mapping, or columns A, B, ... or choice_a, choice_b, ...
    """
    listed: Any = next((raw[key] for key in _OPTION_LISTS if key in raw), None)
    listed = list_of_text(listed) if isinstance(listed, str) else listed
    listed = listed.get("text", listed) if isinstance(listed, dict) else listed
    if isinstance(listed, list):
        return dict(zip(string.ascii_uppercase, map(plain_value, listed), strict=False))
    if isinstance(listed, dict):
        return {str(key).upper(): plain_value(value) for key, value in listed.items()}
    for form in ("{}", "choice_{}", "option_{}"):
        keys = [form.format(letter if form == "{}" else letter.lower())
                for letter in string.ascii_uppercase]  # fmt: skip
        found = dict(zip(string.ascii_uppercase, (raw.get(key) for key in keys), strict=True))
        if found["A"] is not None and found["B"] is not None:
            return {key: plain_value(value) for key, value in found.items() if value is not None}
    return {}


def with_options(bare_question: str, raw: Mapping[str, Any]) -> str:
    """Return a question with its options in lines, as the scorer ``option`` reads them."""
    return "\n".join(
        [bare_question, *(f"{key}. {text}" for key, text in record_options(raw).items())]
    ).strip()


def image_group(raw: Mapping[str, Any], name: str) -> str:
    """Return "category/image" of a question, as MME's ids are; "" if they are unknown."""
    category = raw.get("category")
    if not isinstance(category, str):
        return name if "/" in name else ""
    image = next((raw[key] for key in ("image_path", "image_id", "image") if key in raw), None)
    image = name if name.startswith(f"{category}/") or not isinstance(image, str) else image
    return image if image.startswith(f"{category}/") else f"{category}/{image}"


def list_of_text(text: str) -> Any:
    """Return a list of texts that is written as a text of Python or JSON, else the text."""
    try:
        found = ast.literal_eval(text) if len(text) < 2**16 else text
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    is_list = isinstance(found, list) and found and all(isinstance(each, str) for each in found)
    return found if is_list else text


def flat(text: str) -> str:
    """Return a text without case, line breaks and image marks, to compare questions."""
    return " ".join(text.replace("<image>", " ").lower().split())


def _role(turn: Mapping[str, Any]) -> object:
    return turn.get("from", turn.get("role"))


def _turns(raw: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    turns = raw.get("conversations", raw.get("messages"))
    return [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
