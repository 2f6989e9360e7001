"""One process at a time: ranks and workers start together and want the same files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two processes only do the same work twice.
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def exclusive(place: Path) -> Iterator[None]:
    """Hold a lock on an existing file or folder; a killed process lets go by itself.

    Raises:
        OSError: if the place cannot be opened.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        # Some network file systems refuse to lock; two processes then only waste work.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
