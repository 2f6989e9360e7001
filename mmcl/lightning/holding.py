"""One start at a time: whoever writes into a run's folder holds a lock on it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, nobody notices a second start.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
# The temporary names of `write_atomic`.
_LEFT = re.compile(r"\..+\.\d+\.[0-9a-f]{6}\.tmp")
_ROOM_TRIED = 4096


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a run's folder if need be, keep other starts out of it, and tidy it.

    A killed process lets go by itself, and files that it left half written are removed. Where a
    network file system refuses to lock, nobody is kept out.

    Args:
        folder: of the run; the processes of a machine and, where its file system can lock over
            the network, of other machines are kept out.

    Raises:
        OSError: if the folder cannot be made or written to.
        RuntimeError: if another process holds it.
    """
    handle = _opened(folder)
    try:
        _lock(handle, folder)
        _sweep(folder)
        yield
    finally:
        os.close(handle)


def _opened(folder: Path) -> int:
    """Open the lock of a folder that takes files, in itself and in the folders inside."""
    place = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *(entry for entry in folder.iterdir() if entry.is_dir())):
            with tempfile.TemporaryFile(dir=place) as trial:
                trial.write(bytes(_ROOM_TRIED))
        place = folder / LOCK
        return os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        what = "file" if place.name == LOCK else "folder"
        raise OSError(
            f"the run's {what} {place} cannot be written to ({error.strerror}): nothing was begun; "
            "change that, or give --runs another folder"
        ) from error


def _lock(handle: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        # Not flock: the loader's workers would inherit that, and outlive a run that is killed.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            return
        raise RuntimeError(
            f"{folder} is being written by {_holder(handle)}: wait until that ends, or give this "
            "run another --name"
        ) from None
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    note = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
    with contextlib.suppress(OSError):  # without room for the note the lock still holds
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{json.dumps(note)}\n".encode(), 0)


def _holder(handle: int) -> str:
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"process {note['process']} on {note['host']} since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written; who holds the folder writes alone."""
    for left in folder.rglob(".*.tmp"):
        if _LEFT.fullmatch(left.name) and left.is_file():
            with contextlib.suppress(OSError):
                left.unlink()
