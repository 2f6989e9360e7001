"""Formatting of numbers, sizes, times and untrusted names in a report."""

from __future__ import annotations

import unicodedata

_DIFFERENCES = ("forgetting", "transfer", "change", "degradation", "gap", "delta", "loss")
_RATIOS = ("retention", "FUAR")
_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
# Line separators, and characters that change the writing direction or that XML forbids.
_HIDDEN = frozenset(
    "\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufffe\uffff"
)
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def sanitize(name: str) -> str:
    """Sanitize an untrusted name: replace control characters, lone surrogates and the like.

    A name from a card may hold terminal escape sequences or characters that XML forbids.
    """
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_hidden(letter) else letter for letter in name)


def clean_lines(text: str) -> str:
    """Replace characters that cannot be shown in a text of several lines, such as a question."""
    return "\n".join(map(sanitize, text.strip().replace("\r\n", "\n").split("\n")))


def shorten(name: str, length: int) -> str:
    """Shorten a name to ``length`` characters, the last an ellipsis if something was cut."""
    shown = sanitize(name)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def percent(value: float) -> str:
    """Format a score in percent with one decimal."""
    return f"{100 * value:.1f}"


def format_metric(name: str, value: float) -> str:
    """Format a metric: differences with their sign, ratios as they are, the rest in percent."""
    if name.startswith(_RATIOS):
        return f"{value:.3f}"
    if is_difference(name):
        return f"{100 * value:+.1f}"
    return percent(value)


def unit(name: str) -> str:
    """Unit of a metric as ``format_metric`` formats it: %, pp or ×."""
    if name.startswith(_RATIOS):
        return "×"
    return "pp" if is_difference(name) else "%"


def is_difference(name: str) -> bool:
    """Return whether a metric is a difference of two scores."""
    start = name.split(" of ")[0].lower()
    return "(mtil)" not in start and any(word in start for word in _DIFFERENCES)


def size(count: float) -> str:
    """Format a number of bytes: 512 B, 3.1 MiB."""
    for unit_name in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} B" if unit_name == "B" else f"{count:.1f} {unit_name}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def duration(seconds: float) -> str:
    """Format a time: 8.4 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def format_count(count: float) -> str:
    """Format a count: 950, 12.3 k, 4.5 M, 6.7 G, 8.9 T, 1.2e+16."""
    if count >= 1e15:
        return f"{count:.1e}"
    if count < 1e4:
        return f"{count:.0f}"
    scale, letter = next(pair for pair in _SCALES if count >= pair[0])
    return f"{count / scale:.1f} {letter}"


def _is_hidden(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs") or letter in _HIDDEN
