"""Text normalization: words of a text, option letters, and whether a right answer occurs."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Scripts written without spaces: each letter is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# After ``_classed``: a number with its sign and point, a letter of such a script, a run of letters.
_WORD = re.compile(rf"(?<!\S)-?\d+(?:[.,]\d+)*(?!\w)|[{_UNSPACED}]|(?:(?![{_UNSPACED}])\S)+")
_KEPT_INSIDE = re.compile(r"(?<=\d)[.,](?=\d)|(?<!\S)-(?=\d)")
_YES_NO = frozenset(("yes", "no"))

_KEY = r"\b(?:answer|option|choice|letter)\b(?:\s+is)?\s*[:=]?\s*"
_NAMED = re.compile(rf"(?i:{_KEY})[\"'*(\[]*(?:([A-Z])(?![\w'’-])|([a-z])(?:[.)\]]|\W*$))")
_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_LEADING = re.compile(r"\W*(?:\(([A-Za-z])\)|([A-Z])[.):])")
_STANDING = re.compile(
    r"(?<![\w'’-])(?:([B-HJ-Z])(?![\w'’-])|([AI])(?=[.)\]:]|\W*$|\s(?:or|and)\s))"
)


def plain(text: str) -> str:
    """Normalize an answer: no case, no surrounding white space, no final full stop."""
    lowered = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    kept = "".join(letter for letter in lowered if not _is_invisible(letter)).strip()
    return kept[:-1].rstrip() if len(kept) > 1 and kept[-1] in ".。" else kept


@lru_cache(maxsize=65536)
def words(text: str) -> tuple[str, ...]:
    """Split a text into words without case and punctuation.

    Letters with their marks and digits make words. A number keeps its sign, point and comma, a
    symbol (``+``, ``°``, an emoji) and a Chinese or Japanese letter is a word of its own.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    kept = {found.start() for found in _KEPT_INSIDE.finditer(text)}
    return tuple(_WORD.findall("".join(_classed(text, kept))))


def occurs(reference: str, answer: str) -> bool:
    """Return whether a right answer occurs in a prediction, as whole words one after the other.

    Never the other way round: a part of the right answer is not right. A right answer of one letter
    (an option) is compared with ``option_letter``, as "a" is also an article. Of "yes" and "no"
    only the right one may occur.
    """
    option = _ALONE.fullmatch(reference)
    if option is not None:
        return option_letter(answer) == option[1].upper()
    wanted, found = words(reference), words(answer)
    if len(wanted) == 1 and wanted[0] in _YES_NO:
        return _YES_NO.intersection(found) == set(wanted)
    return bool(wanted) and has_words(found, wanted)


def has_words(text: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Return whether words occur in a text one after the other."""
    return any(text[start : start + len(wanted)] == wanted for start in range(len(text)))


def option_letter(answer: str) -> str | None:
    """Option letter that a prediction chooses: "b", "(B) Paris", "The answer is B", "Paris, B".

    Returns:
        the letter in upper case, None if there is none or more than one.
    """
    alone = _ALONE.fullmatch(answer)
    if alone is not None:
        return alone[1].upper()
    leading = _LEADING.match(answer)
    for found in (
        _NAMED.findall(answer),
        [leading.groups(default="")] if leading is not None else [],
        _STANDING.findall(answer),
    ):
        letters = {(first or second).upper() for first, second in found}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def _classed(text: str, kept: set[int]) -> list[str]:
    """Space out punctuation and symbols, drop invisible characters, keep combining marks."""
    pieces = []
    for index, letter in enumerate(text):
        if _is_invisible(letter):
            continue
        kind = unicodedata.category(letter)[0]
        if kind in "LMN" or letter == "_" or index in kept:
            pieces.append(letter)
        elif kind == "S":
            pieces.append(f" {letter} ")
        else:
            pieces.append(" ")
    return pieces


def _is_invisible(letter: str) -> bool:
    """Return whether a character only joins or varies others, such as a zero-width joiner."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"
