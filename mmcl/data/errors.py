"""Errors in data: of a sample, of a shard, and the list of all errors of a stream."""

from __future__ import annotations

from collections.abc import Sequence

NAMED = 5
"""Errors of one sort that are written in full; the others are only counted."""


class BadSample(ValueError):
    """One sample cannot be used; its text is the reason, without the sample's name."""


class BadShard(ValueError):
    """One shard cannot be used; its text is the reason, without the shard's name."""


class ErrorList:
    """List of everything that is wrong with a stream, to be reported at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Add an error unless it is listed."""
        if line not in self.lines:
            self.lines.append(line)

    def add_some(self, lines: Sequence[str], what: str, count: int | None = None) -> None:
        """Add errors of one sort: the first ``NAMED`` in full, the others as a count.

        Args:
            lines: one for every error, or at least for the first ``NAMED``.
            what: names the sort in the last line, such as "repeated keys in task 'zero-one'".
            count: errors of this sort; None = as many as lines.
        """
        for line in lines[:NAMED]:
            self.add(line)
        more = (len(lines) if count is None else count) - NAMED
        if more > 0:
            self.add(f"and {more} more {what}")

    def raise_all(self, stream: str) -> None:
        """Raise one exception that lists every error, if there is any.

        Raises:
            ValueError: a line for each error.
        """
        if self.lines:
            listed = "\n".join(f"  - {line}" for line in self.lines)
            raise ValueError(f"stream '{stream}' has {count_errors(len(self.lines))}:\n{listed}")


def count_errors(count: int) -> str:
    """Return the number of errors in words: "1 error", "2 errors"."""
    return "1 error" if count == 1 else f"{count} errors"
