"""Fetching one remote shard: several attempts, going on where a transfer was cut off."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO

from mmcl.data.faults import BadShard
from mmcl.data.remote.clouds import open_cloud
from mmcl.data.remote.download import Download, PassingFault
from mmcl.data.remote.web import WEB, open_web

_STEP = 1 << 26
"""Bytes by which room is asked for where nobody states how many there are."""
# Python's own generator belongs to the user, who may have seeded it.
_CHANCE = random.SystemRandom()


Reserve = Callable[[int, int], int]
"""Called with (bytes that a file has to hold, bytes it had better hold), gives those it may."""


@dataclass(frozen=True)
class Patience:
    """How long a fetch goes on trying.

    Attributes:
        attempts: in all, at least 1.
        stall_seconds: without a connection, or without a byte, end an attempt.
        first_wait_seconds: after the first attempt; doubled after each further one.
        longest_wait_seconds: between two attempts, of our own accord.
        longest_asked_seconds: between two attempts, where the server asks for it (Retry-After).
        jitter: share by which a wait is lengthened at most, so that workers do not come at once.
        sleep: waits; tests replace it.
    """

    attempts: int = 5
    stall_seconds: float = 30.0
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 30.0
    longest_asked_seconds: float = 120.0
    jitter: float = 0.25
    sleep: Callable[[float], None] = time.sleep

    def wait(self, attempts: int, asked_seconds: float = 0.0) -> None:
        """Wait after so many attempts, as long as the server asks for or longer."""
        own = min(self.first_wait_seconds * 2.0 ** (attempts - 1), self.longest_wait_seconds)
        seconds = max(own, min(asked_seconds, self.longest_asked_seconds))
        self.sleep(seconds * (1.0 + self.jitter * _CHANCE.random()))


def fetch(
    address: str,
    file: FileIO,
    *,
    reserve: Reserve,
    sha256: str = "",
    patience: Patience | None = None,
) -> None:
    """Write a remote shard into a file.

    Args:
        address: of the shard; no error names it, it may hold a password.
        file: open for writing; what it holds is written over.
        reserve: asked for room as soon as the size of the shard is known, else in steps.
        sha256: of the shard in hex, "" = unknown. On a mismatch it is fetched a second time.
        patience: how often and how long.

    Raises:
        BadShard: if it does not arrive whole, with what happened at every attempt.
        OSError: if the file cannot be written.
    """
    patience = patience or Patience()
    work = _Fetch(address, file, reserve, sha256.lower())
    failures: list[str] = []
    while True:
        try:
            work.attempt(patience.stall_seconds)
            return
        except PassingFault as fault:
            failures.append(str(fault))
            asked = fault.wait_seconds
            if fault.starts_over:
                work.version = ""
        if len(failures) >= patience.attempts:
            count = "1 attempt" if len(failures) == 1 else f"{len(failures)} attempts"
            raise BadShard(
                f"could not be fetched after {count} ({_summary(failures)}): check the address "
                "and the network, or fetch it yourself and name the file"
            )
        patience.wait(len(failures), asked)


class _Fetch:
    """What is known of a shard after some attempts."""

    def __init__(self, address: str, file: FileIO, reserve: Reserve, sha256: str) -> None:
        self.address = address
        self.file = file
        self.reserve = reserve
        self.sha256 = sha256
        self.digest = hashlib.sha256()
        self.written = 0
        self.reserved = -1
        self.total: int | None = None
        self.version = ""
        self.other_hash = ""

    def attempt(self, seconds: float) -> None:
        start = self.written if self.version else 0
        with _opened(self.address, start, self.version, seconds) as download:
            self.begin(download)
            for piece in self.arriving(download, seconds):
                self.write(piece)
        if self.total not in (None, self.written):
            raise PassingFault(f"it was cut off at {self.place()}")
        self.check_hash()
        self.file.truncate(self.written)

    def begin(self, download: Download) -> None:
        if download.start == 0 or download.start != self.written:
            self.file.seek(0)
            self.digest, self.written = hashlib.sha256(), 0
        self.total, self.version = download.total, download.version
        if self.total is not None and self.total != self.reserved:
            self.reserved = self.reserve(self.total, self.total)

    def arriving(self, download: Download, seconds: float) -> Iterator[bytes]:
        """Give the pieces; where they break off, tell at which byte."""
        try:
            yield from download.pieces
        except TimeoutError:
            raise PassingFault(f"it stalled for {seconds:g} s at {self.place()}") from None
        except OSError:
            raise PassingFault(f"it was cut off at {self.place()}") from None

    def write(self, piece: bytes) -> None:
        after = self.written + len(piece)
        if self.total is None and after > self.reserved:
            self.reserved = self.reserve(after, after + _STEP)
        elif self.total is not None and after > self.total:
            raise PassingFault(f"more bytes came than the {self.total:,} stated", starts_over=True)
        rest = memoryview(piece)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.written = after
        if self.sha256:
            self.digest.update(piece)

    def place(self) -> str:
        of = "" if self.total is None else f" of {self.total:,}"
        return f"byte {self.written:,}{of}"

    def check_hash(self) -> None:
        own = self.digest.hexdigest()
        if not self.sha256 or own == self.sha256:
            return
        if self.other_hash:
            raise BadShard(
                f"has the sha256 {own} and the card says {self.sha256}, also when it is fetched "
                "again: it is not the shard that the card was written for; correct the address "
                "or the card"
            )
        self.other_hash = own
        raise PassingFault("its sha256 was not the card's", starts_over=True)


def _opened(
    address: str, start: int, version: str, seconds: float
) -> contextlib.AbstractContextManager[Download]:
    scheme = address.partition(":")[0].lower()
    return (open_web if scheme in WEB else open_cloud)(address, start, version, seconds)


def _summary(failures: list[str]) -> str:
    grouped = [(text, len(list(alike))) for text, alike in itertools.groupby(failures)]
    return "; ".join(text if count == 1 else f"{text}, {count} times" for text, count in grouped)
