"""Location of a shard: a local path, or the cached copy of a remote one, fetched whole."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote, urlparse

from mmcl.data.remote.cache import CachedFile, ShardCache
from mmcl.data.remote.download import FILE_SYSTEMS, WEB
from mmcl.data.remote.fetch import RetryPolicy
from mmcl.data.stored_sample import BadShard

_REMOTE = WEB | FILE_SYSTEMS.keys()


def default_cache() -> Path:
    """Return the cache folder of this user: $MMCL_CACHE, else mmcl in the usual place."""
    stated = os.environ.get("MMCL_CACHE")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcl"


@dataclass(frozen=True, slots=True)
class LocalFile:
    """Local shard.

    Args:
        file: its path.
    """

    file: str | Path
    is_remote: ClassVar[bool] = False

    @property
    def url(self) -> str:
        """Return the path."""
        return str(self.file)

    def path(self) -> Path:
        """Return the path.

        Raises:
            BadShard: if there is no such file.
        """
        path = Path(self.file)
        if not path.is_file():
            raise BadShard(
                f"is missing, there is no file {path}: build the stream or correct the card"
            )
        return path


ShardLocation = LocalFile | CachedFile
"""Location of the bytes of a shard; picklable."""


def resolve_url(
    url: str,
    cache: Path,
    *,
    allow_pipes: bool = False,
    limit_bytes: int | None = None,
    sha256: str = "",
    patience: RetryPolicy | None = None,
) -> ShardLocation:
    """Resolve the url of a shard to its location; nothing is opened or fetched yet.

    Args:
        url: a path, a ``file://`` url, or the url of a remote shard.
        cache: folder whose folder "shards" holds the copies of remote shards.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        limit_bytes: that remote shards may take there; None = no limit.
        sha256: of the shard in hex, "" = unknown; a remote shard is checked while it is fetched.
        patience: retries and timeouts of a fetch; None = five attempts.

    Raises:
        BadShard: if the url is refused.
    """
    try:
        scheme = urlparse(url).scheme.lower()
        has_server = bool(urlparse(url).hostname)
    except ValueError:
        raise BadShard("has an address that makes no sense: correct the card") from None
    if scheme == "file":
        return LocalFile(unquote(urlparse(url).path))
    if scheme == "pipe":
        if not allow_pipes or not url.startswith("pipe:"):
            raise BadShard(
                "is a 'pipe:' url, which runs a command of whoever wrote the card: read the "
                "command, then give allow_pipes=True if you trust it, or name a file"
            )
    elif "://" not in url:
        return LocalFile(url)
    elif scheme not in _REMOTE:
        raise BadShard(
            f"has the scheme '{scheme}', expected one of {', '.join(sorted(_REMOTE))} or a path"
        )
    elif not url.isprintable():
        raise BadShard("has an address with control characters: correct the card")
    elif scheme in WEB and not has_server:
        raise BadShard("has an address without a server: correct the card")
    return CachedFile(url, _cache_at(cache / "shards", limit_bytes, patience), sha256.lower())


def is_remote(url: str) -> bool:
    """Return whether the shard at this url is remote: fetched, or written by a command."""
    return url.startswith("pipe:") or ("://" in url and not url.lower().startswith("file:"))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)
def _cache_at(folder: Path, limit_bytes: int | None, patience: RetryPolicy | None) -> ShardCache:
    """Return the ``ShardCache`` that all shards of a folder share."""
    return ShardCache(folder, limit_bytes, patience or RetryPolicy())
