"""One process at a time: ranks and workers start together and want the same files."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
    try:
        # NFS locks only what is open for writing, which a folder never is.
        handle = os.open(place, os.O_RDWR)
    except OSError:
        handle = os.open(place, os.O_RDONLY)
    try:
        # Some network file systems refuse to lock; two processes then only waste work.
        with contextlib.suppress(OSError):
            _lock(handle)
        yield
    finally:
        _let_go(handle)


@contextlib.contextmanager
def own_file(place: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a file that nobody else writes meanwhile; others who ask for it wait.

    The file is its own lock: rename or remove it before leaving, and no lock stays behind. One
    that a killed process left is taken over with what it holds. Where nothing can be locked, a
    file of another name is given, so that two processes only do the same work twice.

    Args:
        place: where it stands or will stand; its folder exists.

    Yields:
        Its path, and the file open for reading and writing at its start.

    Raises:
        OSError: if it cannot be opened.
    """
    path, handle = place, _opened(place)
    try:
        try:
            while not _lock(handle) or not _is_at(handle, place):
                _let_go(handle)
                handle = _opened(place)
        except OSError:
            os.close(handle)
            path = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}")
            handle = _opened(path)
        with open(handle, "r+b", closefd=False) as file:
            yield path, file
    finally:
        _let_go(handle)


def is_left_over(place: Path) -> bool:
    """Tell whether the process that wrote a file by ``own_file`` is gone; False if unknown."""
    if fcntl is None:
        return False
    try:
        handle = os.open(place, os.O_RDWR)
    except OSError:
        return False
    try:
        return _lock(handle, wait=False) and _is_at(handle, place)
    except OSError:
        return False
    finally:
        _let_go(handle)


def _opened(place: Path) -> int:
    return os.open(place, os.O_RDWR | os.O_CREAT, 0o666)


def _lock(handle: int, wait: bool = True) -> bool:
    """Lock an open file, False if another has it; OSError where nothing can be locked."""
    if fcntl is None:
        raise OSError("no locks here")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _let_go(handle: int) -> None:
    # A forked child holds the same open file, so closing alone would leave it locked.
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _is_at(handle: int, place: Path) -> bool:
    """Tell whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False
