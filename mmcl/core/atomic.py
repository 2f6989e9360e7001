"""Writing a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, data: bytes | str | Callable[[Path], object]) -> None:
    """Write a file to a temporary name in its own folder, flush it to disk and rename it.

    A process killed at any moment leaves the previous file as it was. The temporary name carries
    the process id, so two writers of one file do not meet; the last rename wins.

    Args:
        path: where the file will stand; missing parent folders are made.
        data: the content, or a function that writes it to the temporary path it is given.

    Raises:
        OSError: if the folder cannot be written to (full disk, read-only).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if callable(data):
            data(temporary)
        else:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
