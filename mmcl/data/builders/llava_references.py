"""Right answers that stand in a file of their own, beside the questions of an instruction file."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmcl.data.builders.llava_json import read_records

References = Callable[[int, Any], list[str]]
"""From (position in the instruction file, record) to all right answers; none where unknown."""


def read_references(path: Path) -> References:
    """Read the right answers of an instruction file's questions.

    Two layouts are understood. COCO's captions, ``{images: [{id, file_name}], annotations:
    [{image_id, caption}]}``, are found by the picture's file name; without file names image n is
    the n-th question. TextVQA's ``{data: [{question_id, answers}]}`` is found by the question.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is in neither layout.
    """
    content = read_records(path)
    whole = content[0] if len(content) == 1 else None
    try:
        if isinstance(whole, Mapping) and "annotations" in whole:
            return _captions(whole)
        if isinstance(whole, Mapping) and "data" in whole:
            return _voted(whole["data"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is broken: {type(error).__name__} {error}") from None
    raise ValueError(
        f"{path} holds no right answers: expected 'images' and 'annotations' as COCO's captions "
        "have them, or 'data' as TextVQA has it"
    )


def _captions(content: Mapping[str, Any]) -> References:
    captions: dict[Any, list[str]] = {}
    for one in content["annotations"]:
        captions.setdefault(one["image_id"], []).append(str(one["caption"]))
    names = {
        posixpath.basename(one["file_name"]): one["id"]
        for one in content.get("images", ())
        if "file_name" in one
    }

    def find(position: int, raw: Any) -> list[str]:
        stated = raw.get("image") if isinstance(raw, Mapping) else None
        name = posixpath.basename(stated) if isinstance(stated, str) else ""
        return captions.get(names.get(name) if names else position + 1, [])

    return find


def _voted(data: Any) -> References:
    answers = {str(one["question_id"]): [str(text) for text in one["answers"]] for one in data}

    def find(position: int, raw: Any) -> list[str]:
        name = raw.get("question_id", raw.get("id")) if isinstance(raw, Mapping) else None
        return answers.get(str(name), [])

    return find
