"""Strict JSON for the files of a run: finite numbers only, errors that name the file."""

import json
from pathlib import Path


def parse(text: str, source: str) -> object:
    """Read JSON text that may have been written by anybody.

    Args:
        text: the text.
        source: what the error calls it, such as the file's path.

    Raises:
        ValueError: if it is not JSON, is nested absurdly deep, or holds NaN or an infinity.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{source} is nested too deep to be read: write it anew") from None
    except ValueError as fault:
        raise ValueError(f"{source} is not valid JSON ({fault}): write it anew") from None


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give the folder of a run that has it")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as fault:
        raise ValueError(f"{path} is not UTF-8 ({fault}): write it anew") from None


def to_bytes(value: object, indent: int | None = 2) -> bytes:
    """Write plain values as UTF-8 JSON, one trailing newline, the same bytes each time.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    # A lone surrogate becomes \udxxx, which is exactly the escape JSON has for it.
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def is_number(value: object) -> bool:
    """Say whether a parsed value is a finite number and not a truth value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -1e300 <= value <= 1e300


def is_count(value: object) -> bool:
    """Say whether a parsed value is a whole number, zero or more, that fits 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_text_list(value: object) -> bool:
    """Say whether a parsed value is a list of strings."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a finite number")
