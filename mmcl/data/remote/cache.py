"""Copies of remote shards in a folder that workers and ranks share, within a number of bytes."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from mmcl.data.faults import BadShard
from mmcl.data.lock import exclusive, remove_left_over, written_once
from mmcl.data.remote.address import cached_name, without_secrets
from mmcl.data.remote.fetch import Patience, fetch

_WHOLE = re.compile(r"[0-9a-f]{16}-.*(?<!\.index\.npz)", re.DOTALL)
_PART = re.compile(r"\.[0-9a-f]{16}-.*\.part(\.[0-9a-f]{8})?", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TURN_SECONDS = 0.1
_FETCHES_AHEAD = 2
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50,
}  # fmt: skip


def bytes_of(size: int | str) -> int:
    """Return a size as a person writes it in bytes: 1000000, "50GB" (10^9), "512MiB" (2^20).

    Raises:
        ValueError: if it is no size, or not above 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower(), re.ASCII)
    unit = None if found is None or isinstance(size, bool) else _UNITS.get(found[2])
    if found is None or unit is None:
        raise ValueError(
            f"size is {size!r}, expected a number of bytes such as 50000000000, or one with a "
            "unit: 50GB (10^9 bytes), 512MiB (2^20 bytes)"
        )
    count = int(found[1]) * unit if found[1].isdecimal() else round(float(found[1]) * unit)
    if count < 1:
        raise ValueError(f"size is {size!r}, expected at least 1 byte: leave it out for no limit")
    return count


@dataclass(frozen=True)
class ShardCache:
    """A folder with copies of remote shards; any number of processes may use it at once.

    Whole shards have the names of ``cached_name``, the time of their last use as access time, and
    the time when they were fetched as modification time. What is being fetched begins with a dot,
    has its final size from the start, and is locked by the process that fetches it.

    Args:
        folder: where they lie; made when the first is fetched.
        limit_bytes: that whole and half-fetched shards may have together; None = any number. What
            is removed while it is mapped takes its room on the disk until it is closed. Shards
            whose size nobody states may go over it until they are whole.
        patience: how often and how long a fetch is tried.
    """

    folder: Path
    limit_bytes: int | None = None
    patience: Patience = field(default_factory=Patience)

    def path(self, address: str, sha256: str = "") -> Path:
        """Return a shard's copy, fetched if it is not there.

        Raises:
            BadShard: if it cannot be fetched, does not fit, or has another hash.
        """
        name = cached_name(address, sha256)
        place = self.folder / name
        while not _is_used(place):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with written_once(place, self.folder / f".{name}.part") as file:
                    if file is not None:
                        self._fetch(address, sha256, f".{name}.part", file)
            except OSError as error:
                raise self._unwritable(error) from None
        return place

    def _fetch(self, address: str, sha256: str, part: str, file: FileIO) -> None:
        reserve = functools.partial(self._reserve, part, file)
        try:
            fetch(address, file, reserve=reserve, sha256=sha256, patience=self.patience)
        except OSError as error:
            missing = os.fstat(file.fileno()).st_size - file.tell()
            raise self._unwritable(error, missing) from None

    def _reserve(self, own: str, file: FileIO, needed: int, wanted: int) -> int:
        """Give a half-fetched file its size, as soon as that many bytes fit.

        Others see the size and leave the room to it, though its bytes are still to come. Waits for
        what others are fetching if that is all there is; whoever waits holds no room itself.
        """
        had = file.tell()
        file.truncate(had)
        if self.limit_bytes is None:
            _tidy_once(self.folder, os.getpid())
            return self._grow(file, had, needed, wanted)
        if needed > self.limit_bytes:
            raise BadShard(
                f"has {needed:,} bytes or more and the cache may hold {self.limit_bytes:,}: raise "
                "the cache limit, or fetch the shard yourself and name the file"
            )
        wanted = min(wanted, self.limit_bytes)
        while True:
            with exclusive(_made(self.folder / ".lock")):
                others, is_moving = _in_flight(self.folder, own)
                over = _shrunk(self.folder, others + wanted - self.limit_bytes)
                if over <= 0 or had or not is_moving:
                    return self._grow(file, had, needed, wanted)
            self.patience.sleep(_TURN_SECONDS)

    def _grow(self, file: FileIO, had: int, needed: int, wanted: int) -> int:
        if shutil.disk_usage(self.folder).free < needed - had:
            raise self._full(needed - had)
        try:
            file.truncate(wanted)
        except OSError as error:
            raise self._unwritable(error, needed - had) from None
        return wanted

    def _unwritable(self, error: OSError, missing: int = 0) -> BadShard:
        if error.errno in _FULL:
            return self._full(missing)
        return BadShard(
            f"cannot be fetched, the cache folder {self.folder} is not writable "
            f"({error.strerror or type(error).__name__}): give cache=<a folder you can write to>, "
            "or name one with $MMCL_CACHE"
        )

    def _full(self, missing: int) -> BadShard:
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
        return BadShard(
            f"could not be stored, the disk of {self.folder} is full (room for {missing:,} more "
            f"bytes is wanted, {free:,} are free): make room, set a lower cache limit, or name a "
            "folder on a larger disk with $MMCL_CACHE"
        )


@dataclass(frozen=True, slots=True)
class CachedOrigin:
    """A shard that is fetched whole into a cache; implements ``Origin``.

    Args:
        address: of the shard, with whatever is secret in it.
        cache: for its copy.
        sha256: of its content in hex, "" = unknown.
    """

    address: str = field(repr=False)
    cache: ShardCache
    sha256: str = ""

    @property
    def url(self) -> str:
        """Return the address without what is secret in it."""
        return without_secrets(self.address)

    @property
    def is_remote(self) -> bool:
        """Tell that it may have to be fetched."""
        return True

    def path(self) -> Path:
        """Return the copy; open it at once, it may be removed again.

        Raises:
            BadShard: if it cannot be fetched.
        """
        return self.cache.path(self.address, self.sha256)

    def fetch_ahead(self) -> None:
        """Begin to fetch it in the background, at most two shards of a process at a time.

        A fetch that fails is told when ``path`` is asked for.
        """
        if not (self.cache.folder / cached_name(self.address, self.sha256)).exists():
            threading.Thread(target=self._fetch_quietly, daemon=True).start()

    def _fetch_quietly(self) -> None:
        with _ahead(os.getpid()), contextlib.suppress(Exception):
            self.path()


def _is_used(place: Path) -> bool:
    """Tell whether a file is there, and note the time."""
    try:
        # The time of modification stays: the index of the shard is checked against it.
        os.utime(place, ns=(time.time_ns(), place.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    except OSError:
        return place.is_file()
    return True


def _in_flight(folder: Path, own: str) -> tuple[int, bool]:
    """Return the bytes of what others fetch, and whether some will be done; remove left-overs.

    Where nothing can be locked, nobody knows whether another process still fetches.
    """
    held, is_moving = 0, False
    for entry in _entries(folder, _PART):
        place = Path(entry.path)
        if entry.name.startswith(own):
            continue
        with contextlib.suppress(OSError):
            if remove_left_over(place):
                continue
            size = place.stat().st_size
            held += size
            is_moving = is_moving or (size > 0 and entry.name.endswith(".part"))
    return held, is_moving


def _shrunk(folder: Path, over: int) -> int:
    """Remove the shards used longest ago until at least this many bytes are gone.

    Args:
        folder: of the cache.
        over: bytes above the limit without any whole shard; those are added.

    Returns:
        The bytes still above the limit.
    """
    whole = []
    for entry in _entries(folder, _WHOLE):
        with contextlib.suppress(OSError):
            status = entry.stat()
            used = max(status.st_atime_ns, status.st_mtime_ns)
            whole.append((used, entry.path, status.st_size))
    over += sum(size for *_, size in whole)
    for _, path, size in sorted(whole):
        if over <= 0:
            break
        # Windows removes nothing that is open.
        with contextlib.suppress(OSError):
            os.unlink(path)
            over -= size
    return over


def _entries(folder: Path, names: re.Pattern[str]) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if names.fullmatch(entry.name)]


def _made(lock: Path) -> Path:
    lock.touch()
    return lock


@functools.lru_cache(maxsize=16)
def _tidy_once(folder: Path, process: int) -> None:
    """Remove what killed processes left, once in every process."""
    _in_flight(folder, "/")


@functools.cache
def _ahead(process: int) -> threading.BoundedSemaphore:
    # A forked process gets one of its own: the threads that hold the other stay with its parent.
    return threading.BoundedSemaphore(_FETCHES_AHEAD)
