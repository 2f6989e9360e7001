"""Atomic writing of files: a reader sees the old file or the new one, never a half-written one."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

OUT_OF_SPACE = {
    errno.ENOSPC: ("its disk is full", "make room"),
    errno.EDQUOT: ("the quota is used up", "make room, or ask for a larger quota"),
    errno.EFBIG: ("it is larger than a file may be there", "raise the limit (ulimit -f)"),
}
"""Number of a system error that means a full disk -> (what is wrong, what to do)."""
_CLOSED = {
    errno.EROFS: "its disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
}


class WriteError(OSError):
    """Error of a file that cannot be written; the file that was there before is unchanged.

    Args:
        sentence: what is wrong, what was got, what to do.
        number: ``errno`` of the system's own error.
    """

    def __init__(self, sentence: str, number: int | None = None) -> None:
        super().__init__(sentence)
        self.errno = number


def write_atomic(
    path: Path, data: bytes | str | Callable[[Path], object], *, needs: int | None = None
) -> None:
    """Write a file atomically: to a temporary name in its folder, flushed to disk, then renamed.

    If the process is killed or the machine loses power, the previous file is unchanged. The
    temporary name, ``.<name>.<process>.<random>.tmp``, is unique among threads, processes and
    machines; the last rename wins. Its permissions are those of any new file there (umask), also if
    the function that writes it chooses others, as safetensors does.

    Args:
        path: file to write; missing parent folders are made.
        data: the content, or a function that writes it to the temporary path that it is given.
        needs: bytes that such a function will write, if known; only for the error message.

    Raises:
        WriteError: if the disk is full or the folder is not writable; an OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            temporary.touch()
            mode = temporary.stat().st_mode
            content(temporary)
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode)
        else:
            needs = len(content)
            temporary.write_bytes(content)
        sync_to_disk(temporary)
        temporary.replace(path)
        # Windows cannot open a folder, and some network systems cannot flush one.
        with contextlib.suppress(OSError):
            sync_to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        _remove(temporary)  # before the free space is measured
        refusal = _refusal(error, path, temporary, needs)
        if refusal is None:
            raise
        raise refusal from error
    finally:
        _remove(temporary)


def sync_to_disk(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be what could not be made
        temporary.unlink(missing_ok=True)


def _refusal(
    error: BaseException, path: Path, temporary: Path, needs: int | None
) -> WriteError | None:
    """Return the error to raise for a failed write; None if the error is not about writing."""
    for found in _system_errors(error):
        number = found.errno or 0
        if number in OUT_OF_SPACE:
            why, advice = OUT_OF_SPACE[number]
            why += _room(path, needs)
        elif number in _CLOSED and _is_about(found, path, temporary):
            why, advice = _CLOSED[number], "change that, or give another folder"
        else:
            continue
        before = "; the previous file is unchanged" if path.is_file() else ""
        return WriteError(f"{path} cannot be written, for {why}: {advice}{before}", number)
    return None


def _system_errors(error: BaseException | None) -> Iterator[OSError]:
    """Yield the OSErrors in an error's chain of causes: torch hides the system's behind its own."""
    while error is not None:
        if isinstance(error, OSError):
            yield error
        error = error.__cause__ or error.__context__


def _is_about(error: OSError, path: Path, temporary: Path) -> bool:
    # A function that writes may also fail to read a file of its own.
    about = error.filename
    return isinstance(about, str) and Path(about) in (temporary, path, *path.parents)


def _room(path: Path, needs: int | None) -> str:
    known = [] if needs is None else [f"{_size(needs)} are needed"]
    with contextlib.suppress(OSError):
        known.append(f"{_size(shutil.disk_usage(path.parent).free)} are free")
    return f" ({', '.join(known)})" if known else ""


def _size(count: int) -> str:
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB")) if count >= unit), (1e3, "kB")
    )
    return f"{count / unit:.1f} {name}"
