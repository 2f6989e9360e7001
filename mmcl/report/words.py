"""How numbers and foreign names are written in a report."""

from __future__ import annotations

import unicodedata

_DIFFERENCES = ("forgetting", "transfer", "change", "degradation", "gap")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Line ends of some programs, letters that turn the writing direction, and what XML forbids.
_UNSHOWN = frozenset(
    "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff"
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def clean(name: str) -> str:
    """Replace letters that cannot be shown (control characters, lone surrogates) by a mark.

    A name from a card may carry escape sequences for the terminal or bytes that XML forbids.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _is_unshown(letter) else letter for letter in name
    )


def clean_lines(text: str) -> str:
    """Clean a text that may have several lines, such as a question."""
    return "\n".join(map(clean, text.strip().replace("\r\n", "\n").split("\n")))


def shorten(name: str, length: int) -> str:
    """Cut a name to so many letters, an ellipsis for what is gone."""
    shown = clean(name)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def percent(value: float) -> str:
    """Write a score in percent with one decimal."""
    return f"{100 * value:.1f}"


def points(name: str, value: float) -> str:
    """Write a figure: differences with their sign, ratios as they are, the rest in percent."""
    if name.startswith("retention"):
        return f"{value:.3f}"
    if is_difference(name):
        return f"{100 * value:+.1f}"
    return percent(value)


def unit(name: str) -> str:
    """Say what ``points`` counts in."""
    if name.startswith("retention"):
        return "×"
    return "pp" if is_difference(name) else "%"


def is_difference(name: str) -> bool:
    """Say whether a figure is a difference of two scores."""
    words = name.split(" of ")[0].lower()
    return "(mtil)" not in words and any(word in words for word in _DIFFERENCES)


def size(count: float) -> str:
    """Write a number of bytes with the unit that fits."""
    for unit_name in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} B" if unit_name == "B" else f"{count:.1f} {unit_name}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """Write a time: 8.4 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def large(count: float) -> str:
    """Write a count: 950, 12.3 k, 4.5 M, 6.7 G, 8.9 T, 1.2e+16."""
    if count >= 1e15:
        return f"{count:.1e}"
    if count < 1e4:
        return f"{count:.0f}"
    scale, letter = next(pair for pair in _SCALES if count >= pair[0])
    return f"{count / scale:.1f} {letter}"


def _is_unshown(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs") or letter in _UNSHOWN
