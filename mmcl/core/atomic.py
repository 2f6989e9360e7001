"""Writing a file so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_ROOM = {
    errno.ENOSPC: ("its disk is full", "make room"),
    errno.EDQUOT: ("the quota is used up", "make room, or ask for more"),
    errno.EFBIG: ("it is larger than a file may be there", "raise the limit (ulimit -f)"),
}
_CLOSED = {
    errno.EROFS: "its disk is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EEXIST: "a part of the path is a file",
}


class CannotWrite(OSError):
    """A file cannot be written; what stood in its place is as it was.

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
    """Write a file to a temporary name in its own folder, flush it to disk and rename it.

    A process that is killed and a machine that loses its power leave the previous file as it was.
    The temporary name, ``.<name>.<process>.<random>.tmp``, is no other writer's, in this process or
    on another machine; the last rename wins.

    Args:
        path: where the file will stand; missing parent folders are made.
        data: the content, or a function that writes it to the temporary path it is given.
        needs: bytes that such a function will write, as far as is known; only said, never checked.

    Raises:
        CannotWrite: if there is no room for the file or its folder takes none; an OSError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    content = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(temporary)
        else:
            needs = len(content)
            temporary.write_bytes(content)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        _remove(temporary)  # before the free room is asked for
        refusal = _refusal(error, path, temporary, needs)
        if refusal is None:
            raise
        raise refusal from error
    finally:
        _remove(temporary)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder, and some network systems cannot flush one.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be what could not be made
        temporary.unlink(missing_ok=True)


def _refusal(
    error: BaseException, path: Path, temporary: Path, needs: int | None
) -> CannotWrite | None:
    """Say what the system refused; None where the error has nothing to do with writing."""
    for found in _system_errors(error):
        number = found.errno or 0
        if number in _NO_ROOM:
            why, advice = _NO_ROOM[number]
            why += _room(path, needs)
        elif number in _CLOSED and _is_about(found, path, temporary):
            why, advice = _CLOSED[number], "change that, or give another folder"
        else:
            continue
        before = "; the file that stands there is unchanged" if path.is_file() else ""
        return CannotWrite(f"{path} cannot be written, for {why}: {advice}{before}", number)
    return None


def _system_errors(error: BaseException | None) -> Iterator[OSError]:
    """Give an error and those it came from, for torch hides the system's behind its own."""
    while error is not None:
        if isinstance(error, OSError):
            yield error
        error = error.__cause__ or error.__context__


def _is_about(error: OSError, path: Path, temporary: Path) -> bool:
    # What a function reads while it writes may be refused as well.
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
