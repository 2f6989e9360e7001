"""One process at a time: ranks and workers start together and want the same files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from io import FileIO
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
def written_once(place: Path, part: Path) -> Iterator[FileIO | None]:
    """Write a file that several processes want: one writes it, the others wait.

    The half-written file is its own lock, so no lock files pile up; what a killed process left is
    taken over. Where nothing can be locked, every process writes a part of its own, whose name
    goes on after ``part``, and the last one stays.

    Args:
        place: where the file is going to stand; its folder exists.
        part: where it stands until it is whole.

    Yields:
        The file, unbuffered, at its start; it is flushed to disk and renamed when the block is
        left, and removed if the block raises. None if ``place`` has come to be meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    path, handle = _owned(part)
    with open(handle, "r+b", buffering=0) as file:
        try:
            if place.exists():
                yield None
                path.unlink()
            else:
                yield file
                os.fsync(handle)
                if fcntl is None:  # Windows renames nothing that is open.
                    file.close()
                path.replace(place)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            _unlock(handle)


def _owned(part: Path) -> tuple[Path, int]:
    """Open and lock a file; another name where nothing can be locked."""
    while fcntl is not None:
        handle = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError:
            os.close(handle)
            break
        if _is_at(handle, part):
            return part, handle
        _let_go(handle)
    own = part.with_name(f"{part.name}.{secrets.token_hex(4)}")
    return own, os.open(own, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)


def remove_left_over(part: Path) -> bool:
    """Remove a part whose process is gone; False if that is unknown or not so."""
    if fcntl is None:
        return False
    try:
        handle = os.open(part, os.O_RDWR)
    except OSError:
        return False
    try:
        # Nobody may take it over between the look and the removal.
        is_over = _lock(handle, wait=False) and _is_at(handle, part)
        if is_over:
            part.unlink()
        return is_over
    except OSError:
        return False
    finally:
        _let_go(handle)


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
    _unlock(handle)
    os.close(handle)


def _unlock(handle: int) -> None:
    # A forked child holds the same open file, so closing it here would leave it locked.
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def _is_at(handle: int, place: Path) -> bool:
    """Tell whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(handle), place.stat())
    except FileNotFoundError:
        return False
