"""Where a shard lies: a local path, or a remote one's copy, fetched whole into a cache folder."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from webdataset.gopen import gopen

from mmcl.core.atomic import write_atomic
from mmcl.data.faults import BadShard
from mmcl.data.lock import exclusive
from mmcl.data.shard import Origin

_REMOTE = frozenset({"http", "https", "ftps", "sftp", "scp", "gs", "htgs", "hf", "ais"})


def default_cache() -> Path:
    """Return the cache folder of this user: $MMCL_CACHE, else mmcl in the usual place."""
    stated = os.environ.get("MMCL_CACHE")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcl"


@dataclass(frozen=True, slots=True)
class LocalOrigin:
    """A shard that lies on this machine; implements ``Origin``.

    Args:
        file: its path.
    """

    file: str | Path

    @property
    def url(self) -> str:
        """Return the path."""
        return str(self.file)

    @property
    def is_remote(self) -> bool:
        """Tell that nothing has to be fetched."""
        return False

    def path(self) -> Path:
        """Return the path.

        Raises:
            BadShard: if there is no such file.
        """
        return _existing(Path(self.file))


@dataclass(frozen=True, slots=True)
class CachedOrigin:
    """A shard that is fetched whole into a cache folder; implements ``Origin``."""

    url: str
    cache: Path
    allow_pipes: bool = False

    @property
    def is_remote(self) -> bool:
        """Tell that it may have to be fetched."""
        return True

    def path(self) -> Path:
        """Return the fetched copy.

        Raises:
            BadShard: if it cannot be fetched.
        """
        return local_shard(self.url, self.cache, self.allow_pipes)


def origin_of(
    url: str,
    cache: Path,
    *,
    allow_pipes: bool = False,
    limit_bytes: int | None = None,
    sha256: str = "",
) -> Origin:
    """Return where a shard comes from.

    Args:
        url: a path, a ``file://`` url, or the url of a remote shard.
        cache: folder for remote shards.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        limit_bytes: room that remote shards may take in ``cache``; None = any.
        sha256: what the card says about the shard in hex, "" = nothing.

    Raises:
        BadShard: if the url is refused.
    """
    scheme = urlparse(url).scheme.lower()
    if scheme == "file":
        return LocalOrigin(unquote(urlparse(url).path))
    if scheme == "pipe":
        if not allow_pipes or not url.startswith("pipe:"):
            raise BadShard(
                "is a 'pipe:' url, which runs a command of whoever wrote the card: read the "
                "command, then give allow_pipes=True if you trust it, or name a file"
            )
    elif "://" not in url:
        return LocalOrigin(url)
    elif scheme not in _REMOTE:
        raise BadShard(
            f"has the scheme '{scheme}', expected one of {', '.join(sorted(_REMOTE))} or a path"
        )
    return CachedOrigin(url, cache, allow_pipes)


def local_shard(url: str, cache: Path, allow_pipes: bool = False) -> Path:
    """Return a path that holds a shard, fetching it first if it is remote and not there yet.

    A remote shard is written to a temporary name and renamed when it is whole; what is in the
    cache is not asked for again.

    Args:
        url: a path, a ``file://`` url, or the url of a remote shard.
        cache: folder for remote shards.
        allow_pipes: run ``pipe:`` urls, which are shell commands.

    Raises:
        BadShard: if there is no such file, or the url is refused or cannot be fetched.
    """
    scheme = urlparse(url).scheme.lower()
    if scheme == "file":
        url, scheme = unquote(urlparse(url).path), ""
    if scheme == "pipe":
        if not allow_pipes or not url.startswith("pipe:"):
            raise BadShard(
                "is a 'pipe:' url, which runs a command of whoever wrote the card: read the "
                "command, then give allow_pipes=True if you trust it, or name a file"
            )
    elif "://" not in url:
        return _existing(Path(url))
    elif scheme not in _REMOTE:
        raise BadShard(
            f"has the scheme '{scheme}', expected one of {', '.join(sorted(_REMOTE))} or a path"
        )
    return _fetched(url, cache)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadShard(f"is missing, there is no file {path}: build the stream or correct the card")
    return path


def _fetched(url: str, cache: Path) -> Path:
    name = re.sub(r"[^\w.-]", "_", Path(urlparse(url).path).name)[-80:] or "shard"
    path = cache / "shards" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if path.is_file():
        return path
    with exclusive(_lockable(path.with_name(f"{path.name}.lock"))):
        if not path.is_file():
            try:
                write_atomic(path, lambda temporary: _download(url, temporary))
            # gopen hands over to curl, gsutil or a hub's client, each with errors of its own.
            except Exception as error:
                raise BadShard(
                    f"could not be fetched ({_reason(error)}): check the address "
                    "and the network, or fetch it yourself and name the file"
                ) from None
    return path


def _reason(error: Exception) -> str:
    # gopen's errors quote the whole command, with the user's token for a private hub.
    status = re.search(r"exit (-?\d+)", str(error))
    if status is not None:
        return f"the fetching command ended with status {status[1]}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _download(url: str, temporary: Path) -> None:
    # Leaving the block waits for the fetching command and raises if it failed half-way.
    with gopen(url, "rb") as stream, temporary.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)


def _lockable(lock: Path) -> Path:
    """Make the file by which processes fetch a shard one at a time."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise BadShard(
            f"cannot be fetched, the cache folder {lock.parent} is not writable ({error.strerror})"
            ": give cache=<a folder you can write to>"
        ) from None
    return lock
