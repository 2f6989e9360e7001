"""Short, printable quotes of untrusted values for error messages."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

MAX_QUOTED = 200
"""Characters of a quoted value, at most."""

_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong, _SHORT.maxlevel = 120, 120, 60, 3


def repr_short(value: Any, limit: int = MAX_QUOTED) -> str:
    """Return the ``repr`` of a value on one line, at most ``limit`` characters and an ellipsis.

    Long texts and numbers, large and nested collections are abbreviated before they are written
    out, so the time is bounded as well.
    """
    text = _SHORT.repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def sanitize(text: str) -> str:
    """Return a text on one line: control characters, line breaks, lone surrogates are escaped."""
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)
