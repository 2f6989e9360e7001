"""Where a shard lies: a local path, or a remote one's copy, fetched whole into a cache folder."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlparse

from mmcl.data.faults import BadShard
from mmcl.data.remote.cache import CachedOrigin, ShardCache
from mmcl.data.remote.clouds import COMMANDS, FILE_SYSTEMS
from mmcl.data.remote.fetch import Patience
from mmcl.data.remote.web import WEB
from mmcl.data.shard import Origin

_REMOTE = WEB | FILE_SYSTEMS | COMMANDS.keys()


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


def origin_of(
    url: str,
    cache: Path,
    *,
    allow_pipes: bool = False,
    limit_bytes: int | None = None,
    sha256: str = "",
    patience: Patience | None = None,
) -> Origin:
    """Return where a shard comes from; nothing is looked at or fetched yet.

    Args:
        url: a path, a ``file://`` url, or the url of a remote shard.
        cache: folder whose folder "shards" holds the copies of remote shards.
        allow_pipes: run ``pipe:`` urls, which are shell commands.
        limit_bytes: that remote shards may take there; None = any number.
        sha256: of the shard in hex, "" = unknown; a remote one is checked against it as it comes.
        patience: of a fetch; None = five attempts.

    Raises:
        BadShard: if the url is refused.
    """
    try:
        scheme = urlparse(url).scheme.lower()
        has_server = bool(urlparse(url).hostname)
    except ValueError:
        raise BadShard("has an address that makes no sense: correct the card") from None
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
    elif not url.isprintable():
        raise BadShard("has an address with control characters: correct the card")
    elif scheme in WEB and not has_server:
        raise BadShard("has an address without a server: correct the card")
    return CachedOrigin(url, _cache_at(cache / "shards", limit_bytes, patience), sha256.lower())


def is_remote(url: str) -> bool:
    """Tell whether a shard named so would have to be fetched, or opened by a command."""
    return url.startswith("pipe:") or ("://" in url and not url.lower().startswith("file:"))


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


@functools.lru_cache(maxsize=16)
def _cache_at(folder: Path, limit_bytes: int | None, patience: Patience | None) -> ShardCache:
    """Return the one settings object that all shards of a cache share."""
    return ShardCache(folder, limit_bytes, patience or Patience())
