"""File locks (flock), for the filelock package cannot lock a folder, and 3.x truncates the file.

It also cannot run without locks where a file system has none. flock ends with a killed process but
is inherited by forked children, so the lock of a run directory is another one (``fcntl.lockf``).
"""

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
def file_lock(target: Path) -> Iterator[None]:
    """Hold a lock on an existing file or folder; a killed process releases it.

    Raises:
        OSError: if the path cannot be opened.
    """
    try:
        # NFS locks only what is open for writing, which a folder never is.
        handle = os.open(target, os.O_RDWR)
    except OSError:
        handle = os.open(target, os.O_RDONLY)
    try:
        # Some network file systems refuse to lock; two processes then only waste work.
        with contextlib.suppress(OSError):
            _lock(handle)
        yield
    finally:
        _release(handle)


@contextlib.contextmanager
def write_once(target: Path, partial: Path) -> Iterator[FileIO | None]:
    """Write a file that several processes need: one of them writes it, the others wait.

    The partial file is its own lock, so no lock files pile up; that of a killed process is taken
    over. Where nothing can be locked, every process writes a partial file of its own, with a random
    suffix after ``partial``, and the last rename wins.

    Args:
        target: path of the finished file; its folder exists.
        partial: path of the partial file.

    Yields:
        The file, unbuffered, at its start; it is flushed to disk and renamed when the block ends,
        and removed if the block raises. None if ``target`` exists meanwhile.

    Raises:
        OSError: if it cannot be written.
    """
    path, handle = _open_locked(partial)
    with open(handle, "r+b", buffering=0) as file:
        try:
            if target.exists():
                yield None
                path.unlink()
            else:
                yield file
                os.fsync(handle)
                if fcntl is None:  # Windows renames nothing that is open.
                    file.close()
                path.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        finally:
            _unlock(handle)


def remove_left_over(partial: Path) -> bool:
    """Remove a partial file that no process writes; False if one does or that is unknown."""
    if fcntl is None:
        return False
    try:
        handle = os.open(partial, os.O_RDWR)
    except OSError:
        return False
    try:
        # The lock is held until it is removed, so that nobody takes it over in between.
        is_left = _lock(handle, wait=False) and _is_at(handle, partial)
        if is_left:
            partial.unlink()
        return is_left
    except OSError:
        return False
    finally:
        _release(handle)


def _open_locked(partial: Path) -> tuple[Path, int]:
    """Open and lock a partial file; one of another name where nothing can be locked."""
    while fcntl is not None:
        handle = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except OSError:
            os.close(handle)
            break
        if _is_at(handle, partial):
            return partial, handle
        _release(handle)
    own = partial.with_name(f"{partial.name}.{secrets.token_hex(4)}")
    return own, os.open(own, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)


def _lock(handle: int, wait: bool = True) -> bool:
    """Lock an open file, False if another process has it; OSError where nothing can be locked."""
    if fcntl is None:
        raise OSError("no locks here")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _release(handle: int) -> None:
    _unlock(handle)
    os.close(handle)


def _unlock(handle: int) -> None:
    # A forked child holds the same open file, so closing it here would leave it locked.
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def _is_at(handle: int, target: Path) -> bool:
    """Return whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(handle), target.stat())
    except FileNotFoundError:
        return False
