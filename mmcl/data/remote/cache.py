"""Cache folder of remote shards, shared by workers and ranks, with a limit in bytes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import ClassVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from mmcl.core.atomic_write import OUT_OF_SPACE
from mmcl.data.remote.fetch import RetryPolicy, fetch
from mmcl.data.remote.file_lock import file_lock, remove_left_over, write_once
from mmcl.data.stored_sample import BadShard

_SIGNING = re.compile(r"^x-(amz|goog)-", re.IGNORECASE)
"""Parameters of a signed address; they expire after hours and select no content."""
_SECRET = re.compile(r"token|secret|sign|passw|credential|auth|key|policy|^sig$", re.IGNORECASE)
_WHOLE = re.compile(r"[0-9a-f]{16}-.*(?<!\.index\.npz)", re.DOTALL)
_PART = re.compile(r"\.[0-9a-f]{16}-.*\.part(\.[0-9a-f]{8})?", re.DOTALL)
_TURN_SECONDS = 0.1
_FETCHES_AHEAD = 2
_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50,
}  # fmt: skip


def redact_url(address: str) -> str:
    """Redact the secrets of an address, so that it can be shown and still identifies the content.

    User and password and the parameters of a signature are left out; the value of a parameter
    that sounds secret, and the whole command of a ``pipe:``, is replaced by hex of its sha256.
    """
    if address.startswith("pipe:"):
        return f"pipe:~{_hex(address, 16)}"
    parts = urlsplit(address)
    query = [
        (name, f"~{_hex(value, 8)}" if _SECRET.search(name) else value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if not _SIGNING.match(name)
    ]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, urlencode(query), parts.fragment))


def cached_name(address: str, sha256: str) -> str:
    """Return the file name of a shard's cached copy: ``<16 hex>-<last part of the address>``.

    A content with another ``sha256`` on the card is another file; "" = unknown.
    """
    if address.startswith("pipe:"):
        # The file name in a command may be followed by options with a password.
        last = re.split(r"[\s?&|;'\"]", address.rpartition("/")[2])[0]
    else:
        last = PurePosixPath(unquote(urlsplit(address).path)).name
    name = re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-80:] or "shard"
    stated = f"\n{sha256}" if sha256 else ""
    return f"{_hex(redact_url(address) + stated, 16)}-{name}"


def _hex(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


def parse_size(size: int | str) -> int:
    """Parse a size in bytes: 1000000, "50GB" (10^9), "512MiB" (2^20).

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
    """Folder with copies of remote shards; any number of processes may use it at once.

    Whole shards have the names of ``cached_name``, the time of their last use as access time, and
    the time when they were fetched as modification time. The name of a partial file begins with a
    dot; it has its final size from the start, and is locked by the process that fetches it.

    Args:
        folder: of the copies; made when the first is fetched.
        limit_bytes: of whole and partial shards together; None = no limit. A shard that is evicted
            while it is mapped occupies the disk until it is closed. Shards of unknown size may
            exceed the limit until they are whole.
        patience: retry policy of a fetch.
    """

    folder: Path
    limit_bytes: int | None = None
    patience: RetryPolicy = field(default_factory=RetryPolicy)

    def path(self, address: str, sha256: str = "") -> Path:
        """Return the cached copy of a shard, fetched if it is not there.

        Raises:
            BadShard: if it cannot be fetched, does not fit, or has another hash.
        """
        name = cached_name(address, sha256)
        path = self.folder / name
        while not _is_used(path):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with write_once(path, self.folder / f".{name}.part") as file:
                    if file is not None:
                        self._fetch(address, sha256, f".{name}.part", file)
            except OSError as error:
                raise self._unwritable(error) from None
        return path

    def _fetch(self, address: str, sha256: str, part: str, file: FileIO) -> None:
        reserve = functools.partial(self._reserve, part, file)
        try:
            fetch(address, file, reserve=reserve, sha256=sha256, patience=self.patience)
        except OSError as error:
            missing = os.fstat(file.fileno()).st_size - file.tell()
            raise self._unwritable(error, missing) from None

    def _reserve(self, own: str, file: FileIO, needed: int, wanted: int) -> int:
        """Reserve space: set the size of a partial file as soon as that many bytes fit.

        Other processes count this size before the bytes arrive. Waits while only the fetches of
        others fill the cache; a process that waits reserves nothing itself.
        """
        had = file.tell()
        file.truncate(had)
        if self.limit_bytes is None:
            _tidy_once(self.folder, os.getpid())
            return self._grow(file, had, needed, wanted)
        if needed > self.limit_bytes:
            raise BadShard(
                f"has {needed:,} bytes or more and the cache limit is {self.limit_bytes:,}: raise "
                "the limit, or fetch the shard yourself and name the file"
            )
        wanted = min(wanted, self.limit_bytes)
        lock = self.folder / ".lock"
        while True:
            lock.touch()
            with file_lock(lock):
                others, is_moving = _in_flight(self.folder, own)
                over = _evict_lru(self.folder, others + wanted - self.limit_bytes)
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
        if error.errno in OUT_OF_SPACE:
            return self._full(missing)
        return BadShard(
            f"cannot be fetched, the cache folder {self.folder} is not writable "
            f"({error.strerror or type(error).__name__}): give cache_dir=<a folder you can write "
            "to>, or name one with $MMCL_CACHE"
        )

    def _full(self, missing: int) -> BadShard:
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.folder).free
        return BadShard(
            f"could not be stored, the disk of {self.folder} is full ({missing:,} more bytes are "
            f"needed, {free:,} are free): free some space, set a lower cache limit, or name a "
            "folder on a larger disk with $MMCL_CACHE"
        )


@dataclass(frozen=True, slots=True)
class CachedFile:
    """Remote shard that is fetched whole into a cache.

    Args:
        address: of the shard, with its secrets.
        cache: of its copy.
        sha256: of its content in hex, "" = unknown.
    """

    address: str = field(repr=False)
    cache: ShardCache
    sha256: str = ""
    is_remote: ClassVar[bool] = True

    @property
    def url(self) -> str:
        """Return the address without its secrets."""
        return redact_url(self.address)

    def path(self) -> Path:
        """Return the cached copy; open it at once, for it may be evicted.

        Raises:
            BadShard: if it cannot be fetched.
        """
        return self.cache.path(self.address, self.sha256)

    def prefetch(self) -> None:
        """Prefetch the shard in the background, at most two shards of a process at a time.

        One that is there counts as used. The error of a fetch that fails is raised by ``path``.
        """
        if not _is_used(self.cache.folder / cached_name(self.address, self.sha256)):
            threading.Thread(target=self._fetch_quietly, daemon=True).start()

    def _fetch_quietly(self) -> None:
        with _ahead(os.getpid()), contextlib.suppress(Exception):
            self.path()


def _is_used(path: Path) -> bool:
    """Return whether a file exists, and set its access time."""
    try:
        # The modification time stays: the index of the shard is checked against it.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    except OSError:
        return path.is_file()
    return True


def _in_flight(folder: Path, own: str) -> tuple[int, bool]:
    """Return the bytes that others are fetching, and whether any fetch can end; remove left-overs.

    Without locks it is unknown whether another process still fetches.
    """
    reserved, is_moving = 0, False
    for entry in _entries(folder, _PART):
        path = Path(entry.path)
        if entry.name.startswith(own):
            continue
        with contextlib.suppress(OSError):
            if remove_left_over(path):
                continue
            size = path.stat().st_size
            reserved += size
            is_moving = is_moving or (size > 0 and entry.name.endswith(".part"))
    return reserved, is_moving


def _evict_lru(folder: Path, over: int) -> int:
    """Evict the least recently used shards; return the bytes still above the limit.

    ``over`` are the bytes above the limit without any whole shard; those are added.
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


@functools.lru_cache(maxsize=16)
def _tidy_once(folder: Path, process: int) -> None:
    """Remove the partial files of killed processes, once in every process."""
    _in_flight(folder, "/")


@functools.cache
def _ahead(process: int) -> threading.BoundedSemaphore:
    # One per process: after a fork, the threads that hold the other stay in the parent.
    return threading.BoundedSemaphore(_FETCHES_AHEAD)
