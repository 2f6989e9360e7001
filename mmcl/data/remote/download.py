"""Download of a remote shard, its transient error, and redaction of foreign error texts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PIECE = 1 << 20


@dataclass(frozen=True)
class Download:
    """Bytes of a remote shard as they arrive.

    Attributes:
        pieces: chunks of the content from byte ``start``; raises TransientError, TimeoutError or
            OSError where the transfer breaks off, and may also just end too early.
        total: bytes of the whole shard, None if unknown.
        start: first byte of the first chunk; 0, or where an interrupted transfer is resumed.
        version: differs between two contents of one address, "" = unknown.
    """

    pieces: Iterator[bytes]
    total: int | None
    start: int = 0
    version: str = ""


class TransientError(Exception):
    """Transient error: an attempt failed and a retry may succeed; its text is the reason.

    Args:
        reason: what happened, without the address.
        wait_seconds: that the server requests before the next attempt, 0 = none.
        starts_over: the bytes received so far are useless.
    """

    def __init__(self, reason: str, wait_seconds: float = 0.0, starts_over: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.starts_over = starts_over


def redact(error: BaseException) -> str:
    """Return the text of another library's error with everything secret redacted."""
    text = " ".join(str(error).split())
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S+", r"\1?...", text)
    text = re.sub(r"(?i)(bearer|basic|authorization|token|secret|key)(\W+)\S{8,}", r"\1\2...", text)
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
