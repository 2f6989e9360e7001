"""Opening one shard as a card lists it: a tar or loose files, here or far away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmcl.data.faults import BadShard
from mmcl.data.shard import Origin, Shard
from mmcl.data.shards.loose import SUFFIX, LooseShard
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.source import origin_of, sha256_of


@dataclass(frozen=True)
class Place:
    """How a shard is fetched and opened.

    Attributes:
        cache: see ``prepare``.
        cache_limit: see ``prepare``.
        allow_pipes: see ``prepare``.
        sha256: of the card in lower case, "" = not stated.
        count: samples as the card says, None = not stated.
    """

    cache: Path
    cache_limit: int | None = None
    allow_pipes: bool = False
    sha256: str = ""
    count: int | None = None


def open_shard(name: str, url: str, place: Place, *, is_lazy: bool = False) -> tuple[Origin, Shard]:
    """Return where a shard comes from, and its samples.

    Args:
        name: as the card has it.
        url: a path or an address.
        place: how it is opened.
        is_lazy: leave a tar of a stated count for later.

    Raises:
        BadShard: if it is missing, refused, no whole shard, or of another count than the card says.
        OSError: if it cannot be read.
    """
    origin = origin_of(
        url,
        place.cache,
        allow_pipes=place.allow_pipes,
        limit_bytes=place.cache_limit,
        sha256=place.sha256,
    )
    if name.endswith(SUFFIX):
        return origin, LooseShard(origin, name, place.cache)
    shard = TarShard(origin, name, place.cache, place.count)
    if place.count is None or not is_lazy:
        _ = shard.index
    elif not origin.is_remote:
        origin.path()
    return origin, shard


def expect_hash(origin: Origin, stated: str) -> None:
    """Compare the content of a shard with the card.

    Args:
        origin: of the shard.
        stated: its sha256 in lower case, "" = none.

    Raises:
        BadShard: if it is another, or the shard is missing.
    """
    if not stated:
        return
    path = origin.path()
    own = sha256_of(path)
    if own != stated:
        raise BadShard(
            f"has the sha256 {own} and the card says {stated}: it is not the shard that "
            f"the card was written for; delete {path} and fetch or build it again"
        )
