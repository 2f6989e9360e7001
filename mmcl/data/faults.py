"""What can be wrong with data: a sample, a shard, or a whole stream."""

from __future__ import annotations

_NAMED = 5
"""Faults of one sort that are written out; the rest is counted."""


class BadSample(ValueError):
    """One sample cannot be used; its text is the reason, without the sample's name."""


class BadShard(ValueError):
    """One shard cannot be used; its text is the reason, without the shard's name."""


class Faults:
    """Collects everything that is wrong with a stream, to be told at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Note a fault, once."""
        if line not in self.lines:
            self.lines.append(line)

    def add_some(self, lines: list[str], what: str) -> None:
        """Note faults of one sort: the first few in full, the others as a count.

        Args:
            lines: one for every fault.
            what: names the sort in the last line, for example "repeated keys in task 'zero-one'".
        """
        for line in lines[:_NAMED]:
            self.add(line)
        if len(lines) > _NAMED:
            self.add(f"and {len(lines) - _NAMED} more {what}")

    def raise_all(self, stream: str) -> None:
        """Raise one error that lists every fault, if there is any.

        Raises:
            ValueError: a line for each fault.
        """
        if self.lines:
            count = "1 fault" if len(self.lines) == 1 else f"{len(self.lines)} faults"
            listed = "\n".join(f"  - {line}" for line in self.lines)
            raise ValueError(f"stream '{stream}' has {count}:\n{listed}")
