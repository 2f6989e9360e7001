"""Content of shards in a few digests, so that moved data is recognized and changed data noticed.

A run stores them for every shard that it uses. Whole files are not hashed: of each shard the card's
sha256, the index, and a few blocks spread over the file are known, as far as the run opens it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mmcl.core import Task
from mmcl.data.shards.json_shard import JsonShard
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import Shard
from mmcl.data.shards.tar_shard import TarShard, open_at_once

ShardContent = Mapping[str, Any]
"""``name``, ``samples``, and of the digests ``sha256``, ``index`` and ``blocks`` those known."""
SPLITS = ("train", "test", "sources")
"""Groups of a task's shards; the last are those of the sources that it mixes in."""
_IDENTIFYING = frozenset({"sha256", "index"})
_BLOCKS, _BLOCK_BYTES, _MAX_FILES = 16, 1 << 12, 1000


def task_content(opened: OpenStream, task: Task) -> dict[str, list[dict[str, Any]]]:
    """Return the content of the shards of a task or eval-only task.

    Returns:
        one of ``SPLITS`` -> contents in the order of the card, without a split that is not open,
        as that of a task whose data was released.
    """
    readers = {
        split: opened.readers[task.index, split]
        for split in ("train", "test")
        if (task.index, split) in opened.readers
    }
    shards = {str(split): list(reader.shards) for split, reader in readers.items()}
    if task.mixture:
        mixed = [opened.sources[number].shards for number, _ in task.mixture]
        shards["sources"] = [shard for group in mixed for shard in group]
    hashes = opened.stream.hashes
    return {
        split: [_shard_content(shard, hashes.get(shard.name, "").lower()) for shard in of_split]
        for split, of_split in shards.items()
    }


def _shard_content(shard: Shard, sha256: str) -> dict[str, Any]:
    content: dict[str, Any] = {"name": shard.name, "samples": len(shard)}
    if isinstance(shard, JsonShard):
        # The card's hash would be of the file that names the JSON, whose paths may change.
        return {**content, "index": shard.digest()}
    if sha256:
        content["sha256"] = sha256
    if shard.nbytes:
        index = shard.index
        digest = hashlib.sha256(f"{index.size} {index.extensions}".encode() + index.head_tail_hash)
        for array in (index.first, index.block, index.length, index.kind, index.large):
            digest.update(array.tobytes())
        content["index"] = digest.hexdigest()
        content |= _blocks(shard)
    return content


def _blocks(shard: TarShard) -> dict[str, str]:
    if shard.is_remote:
        return {}
    with open_at_once(shard.origin) as file:
        return {"blocks": spread_hash(file, shard.index.size)}


def content_change(before: Sequence[ShardContent], now: Sequence[ShardContent]) -> str:
    """Return how the shards of a split changed, "" if they are the same or were only moved.

    A shard is the same if all digests that are known of both are equal. One under another name is
    so only if its sha256 or its index is among them.
    """
    if len(before) != len(now):
        return f"it has {len(now)} shards, and had {len(before)}"
    for old, new in zip(before, now, strict=True):
        shared = (old.keys() & new.keys()) - {"name"}
        if any(old[key] != new[key] for key in shared):
            was = "before" if old["name"] == new["name"] else f"{old['name']} had"
            return f"shard {new['name']} has other content than {was}"
        if old["name"] != new["name"] and not shared & _IDENTIFYING:
            return (
                f"shard {new['name']} cannot be recognized as {old['name']}: state its sha256 on "
                "the card under 'hashes'"
            )
    return ""


def spread_hash(file: BinaryIO, size: int) -> str:
    """Return the sha256, in hex, of a file's size and of 16 blocks of 4 KiB spread over it."""
    digest = hashlib.sha256(str(size).encode())
    for block in range(_BLOCKS):
        file.seek(max(0, size - _BLOCK_BYTES) * block // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def path_digest(path: Path) -> str:
    """Return a digest of a file or folder by ``spread_hash``; where it is does not matter.

    Returns:
        sha256 in hex, "" if it cannot be read or is a folder of more than 1000 entries.
    """
    digest = hashlib.sha256()
    try:
        path = path.expanduser()
        found = list(islice(path.rglob("*"), _MAX_FILES + 1)) if path.is_dir() else [path]
        if len(found) > _MAX_FILES:
            return ""
        for file_path in sorted(each for each in found if not each.is_dir()):
            with file_path.open("rb") as file:
                content = spread_hash(file, file_path.stat().st_size)
            line = f"{file_path.relative_to(path)} {content}\n"
            digest.update(line.encode("utf-8", "backslashreplace"))
    except (OSError, ValueError, RuntimeError):  # the last two for a text that is no path
        return ""
    return digest.hexdigest()
