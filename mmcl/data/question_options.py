"""Options and hint of a question: read in the forms of the field, and written in one of them."""

from __future__ import annotations

import ast
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmcl.data.stored_sample import BadSample

OPTION_KEYS = ("choices", "options")
HINT_KEYS = ("hint", "context")
OPTION_PROMPT = "Answer with the option's letter from the given choices directly."
"""Last line of a question with options, as in LLaVA's evaluation of MMBench."""
_OPTION_KEY = re.compile(r"(?:[Oo]ption[ _-]?)?([A-Za-z])")
"""Key of one option: ``A``, ``option_a``."""
_LETTERED = re.compile(r"\s*\(?([A-Z])(?:\)|[.:](?=\s|$)|\)[.:])\s*")
_ANSWER_LETTER = re.compile(r"\(?([A-Za-z])[).:]*")
_MAX_LISTED_CHARACTERS = 128 << 20


def is_absent(value: Any) -> bool:
    """Return whether a value is nothing: None, NaN, an empty text or list, or a list of these."""
    if value is None or value != value:
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple | Mapping):
        return all(map(is_absent, value.values() if isinstance(value, Mapping) else value))
    return False


def first_key(raw: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return the first of these keys whose value is something, "" if there is none."""
    return next((key for key in keys if not is_absent(raw.get(key))), "")


def first_of(raw: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Return the first value of these keys that is something, None if there is none."""
    return raw.get(first_key(raw, keys))


def listed_values(value: Any) -> list[Any]:
    """Return the values of a list, or of the text of a JSON or Python list; [] of others."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("[") or not text.endswith("]") or len(text) > _MAX_LISTED_CHARACTERS:
            return []
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return []
    return list(value) if isinstance(value, list | tuple) else []


def read_options(raw: Mapping[str, Any]) -> dict[str, str]:
    """Return letter -> text of the options of a question, {} if it has none.

    Options are a list, a mapping of letters, or the keys ``A``, ``B`` and so on, of which empty
    ones are left out. Letters that the texts of a list repeat ("A. teal") are taken off.

    Raises:
        BadSample: if they are something else, or more than 26.
    """
    stated = first_of(raw, OPTION_KEYS)
    if stated is None:
        keys = option_keys(raw)
        letters = {letter: raw[key] for letter, key in keys.items()}
        return {letter: _option(text) for letter, text in letters.items() if not _is_nan(text)}
    if isinstance(stated, Mapping):
        pairs = {str(key).strip(): value for key, value in stated.items() if not _is_nan(value)}
        if not all(re.fullmatch("[A-Z]", key) for key in pairs):
            raise BadSample("its options are a mapping whose keys are not the letters A to Z")
        return {letter: _option(pairs[letter]) for letter in sorted(pairs)}
    listed = listed_values(stated)
    if not 2 <= len(listed) <= len(string.ascii_uppercase):
        raise BadSample(f"its options are {str(stated)[:40]!r}, expected a list of 2 to 26 texts")
    texts = [_option(text) for text in listed]
    found = [_LETTERED.match(text) for text in texts]
    if all(
        match is not None and match[1] == letter and len(text) > match.end()
        for match, letter, text in zip(found, string.ascii_uppercase, texts, strict=False)
    ):
        texts = [_LETTERED.sub("", text, count=1) for text in texts]
    return dict(zip(string.ascii_uppercase, texts, strict=False))


def _option(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadSample(f"one of its options is {str(value)[:40]!r}, expected a text")
    return str(value).strip()


def _is_nan(value: Any) -> bool:
    """Return whether an option is missing: a table pads short lists of options."""
    return is_absent(value) or (isinstance(value, str) and value.strip().lower() == "nan")


def option_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return letter -> key of the options that have a key each, {} without A and B."""
    found: dict[str, str] = {}
    for key in keys:
        if matched := _OPTION_KEY.fullmatch(key):
            found.setdefault(matched[1].upper(), key)
    return {letter: found[letter] for letter in sorted(found)} if {"A", "B"} <= found.keys() else {}


def choose_option(options: Mapping[str, str], answer: Any) -> str:
    """Return the letter of the option that an answer names.

    A number counts the options from 0; a text is a letter, the text of an option, or such a number.

    Raises:
        BadSample: if it names none, or two readings name different ones.
    """
    text = str(int(answer) if isinstance(answer, float) and answer.is_integer() else answer).strip()
    found: list[str] = []
    if text.isdecimal() and int(text) < len(options):
        found.append(list(options)[int(text)])
    if not _is_number(answer):
        letter = _ANSWER_LETTER.fullmatch(text)
        found += [letter[1].upper()] if letter and letter[1].upper() in options else []
        found += [own for own, option in options.items() if option == text]
    if len(set(found)) == 1:
        return found[0]
    what = f"may be {' or '.join(sorted(set(found)))} of" if found else "is none of"
    raise BadSample(
        f"its answer {text[:40]!r} {what} its options {', '.join(options)}: write the letter"
    )


def format_question(question: str, hint: Any, options: Mapping[str, str]) -> str:
    """Return a question below its hint and above its options, as LLaVA asks MMBench's."""
    lines = [] if is_nothing(hint) else [str(hint).strip()]
    lines.append(question)
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*lines, OPTION_PROMPT] if options else lines)


def is_nothing(hint: Any) -> bool:
    """Return whether a hint is none; published tables also write it as a word."""
    return is_absent(hint) or (isinstance(hint, str) and hint.strip().lower() in ("nan", "none"))


def choose_only(raw: Mapping[str, Any], options: Mapping[str, str], answers: Sequence[Any]) -> str:
    """Return the letter of the option that the only answer of a record names.

    Raises:
        BadSample: if there are several answers, or as `choose_option`.
    """
    stated = listed_values(first_of(raw, OPTION_KEYS))
    if any(map(_is_number, stated)) and any(map(_is_number, answers)):
        raise BadSample("its options and its answer are numbers: write the option's letter")
    right = [choose_option(options, answer) for answer in answers]
    if len(right) > 1:
        raise BadSample(f"its answer names {len(right)} options, one is supported")
    return right[0]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
