"""What every way of fetching a remote shard gives and raises."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PIECE = 1 << 20


@dataclass(frozen=True)
class Download:
    """The bytes of a remote shard as they arrive.

    Attributes:
        pieces: of the content from byte ``start`` on; raises PassingFault, TimeoutError or OSError
            where it breaks off, and may also just end too early.
        total: bytes of the whole shard, None where nobody states them.
        start: first byte of the first piece; 0, or where a cut-off transfer is gone on with.
        version: tells two contents of one address apart, "" = cannot.
    """

    pieces: Iterator[bytes]
    total: int | None
    start: int = 0
    version: str = ""


class PassingFault(Exception):
    """An attempt failed in a way that may pass; its text is the reason.

    Args:
        reason: what happened, without the address.
        wait_seconds: what the server asks to wait before the next attempt, 0 = nothing.
        starts_over: what came so far is of no use.
    """

    def __init__(self, reason: str, wait_seconds: float = 0.0, starts_over: bool = False) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.starts_over = starts_over


def told(error: BaseException) -> str:
    """Put an error of a foreign library in words, without what could be secret in it."""
    text = " ".join(str(error).split())
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S+", r"\1?...", text)
    text = re.sub(r"(?i)(bearer|basic|authorization|token|secret|key)(\W+)\S{8,}", r"\1\2...", text)
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
