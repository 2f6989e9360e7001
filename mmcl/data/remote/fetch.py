"""Fetch of one remote shard: retries, and resume where a transfer was cut off."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO

from mmcl.data.remote.download import WEB, Download, TransientError, open_cloud, open_web
from mmcl.data.stored_sample import BadShard

_STEP = 1 << 26
"""Bytes reserved at a time where the size of a shard is unknown."""
# Python's global generator belongs to the user, who may have seeded it.
_CHANCE = random.SystemRandom()
Reserve = Callable[[int, int], int]
"""Called with (bytes that a file needs, bytes that it wants), returns the bytes it may have."""


@dataclass(frozen=True)
class RetryPolicy:
    """Retry policy of a fetch: attempts, timeouts and exponential backoff.

    Attributes:
        attempts: number of attempts, at least 1.
        stall_seconds: timeout of an attempt without a connection, or without a byte.
        first_wait_seconds: backoff after the first attempt; doubled after each further one.
        longest_wait_seconds: upper bound of the backoff.
        max_requested_seconds: upper bound where the server requests a wait (Retry-After).
        jitter: largest fraction added to a wait, so that workers do not retry in step.
        sleep: function that waits; tests replace it.
    """

    attempts: int = 5
    stall_seconds: float = 30.0
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 30.0
    max_requested_seconds: float = 120.0
    jitter: float = 0.25
    sleep: Callable[[float], None] = time.sleep

    def wait(self, attempts: int, requested_seconds: float = 0.0) -> None:
        """Wait after a number of attempts, at least as long as the server requests."""
        own = min(self.first_wait_seconds * 2.0 ** (attempts - 1), self.longest_wait_seconds)
        seconds = max(own, min(requested_seconds, self.max_requested_seconds))
        self.sleep(seconds * (1.0 + self.jitter * _CHANCE.random()))


def fetch(
    address: str,
    file: FileIO,
    *,
    reserve: Reserve,
    sha256: str = "",
    patience: RetryPolicy | None = None,
) -> None:
    """Write a remote shard into a file.

    Args:
        address: of the shard; no error names it, for it may hold a password.
        file: open for writing; its content is overwritten.
        reserve: reserves disk space as soon as the size of the shard is known, else in steps.
        sha256: of the shard in hex, "" = unknown. On a mismatch it is fetched a second time.
        patience: retry policy.

    Raises:
        BadShard: if it does not arrive whole, with the error of every attempt.
        OSError: if the file cannot be written.
    """
    patience = patience or RetryPolicy()
    work = _Fetch(address, file, reserve, sha256.lower())
    failures: list[str] = []
    while True:
        try:
            work.attempt(patience.stall_seconds)
            return
        except TransientError as error:
            failures.append(str(error))
            requested = error.wait_seconds
            if error.starts_over:
                work.version = ""
        if len(failures) >= patience.attempts:
            count = "1 attempt" if len(failures) == 1 else f"{len(failures)} attempts"
            alike = [(text, len(list(group))) for text, group in itertools.groupby(failures)]
            listed = "; ".join(text if n == 1 else f"{text}, {n} times" for text, n in alike)
            raise BadShard(
                f"could not be fetched after {count} ({listed}): check the address "
                "and the network, or fetch it yourself and name the file"
            )
        patience.wait(len(failures), requested)


class _Fetch:
    """State of a fetch across its attempts."""

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
        is_web = self.address.partition(":")[0].lower() in WEB
        opened = open_web if is_web else open_cloud
        with opened(self.address, start, self.version, seconds) as download:
            self.begin(download)
            for piece in self.arriving(download, seconds):
                self.write(piece)
        if self.total not in (None, self.written):
            raise TransientError(f"it was cut off at {self.position()}")
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
        """Yield the chunks; an error names the byte where they break off."""
        try:
            yield from download.pieces
        except TimeoutError:
            raise TransientError(f"it stalled for {seconds:g} s at {self.position()}") from None
        except OSError:
            raise TransientError(f"it was cut off at {self.position()}") from None

    def write(self, piece: bytes) -> None:
        after = self.written + len(piece)
        if self.total is None and after > self.reserved:
            self.reserved = self.reserve(after, after + _STEP)
        elif self.total is not None and after > self.total:
            raise TransientError(
                f"more bytes came than the {self.total:,} stated", starts_over=True
            )
        rest = memoryview(piece)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.written = after
        if self.sha256:
            self.digest.update(piece)

    def position(self) -> str:
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
        raise TransientError("its sha256 was not the card's", starts_over=True)
