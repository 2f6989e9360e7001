"""A few samples of every task to look at: a seeded choice, decoded as in training, made small."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mmcl.core import PICTURE, Dialogue, Task, TaskStream
from mmcl.data.checks.shard_check import look_at
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.faults import BadSample, BadShard
from mmcl.data.prepare import Part
from mmcl.data.reader import Reader
from mmcl.data.shards.opening import Place, open_shard
from mmcl.data.source import default_cache

_LARGEST_SIDE = 320
_PIXEL_ART_SIDE = 96
"""Pictures up to here are kept as they are, pixel for pixel."""

_TRIES = 4


@dataclass(frozen=True)
class DrawnSample:
    """A sample that a person can look at.

    Attributes:
        key: its name.
        shard: that it lies in.
        picture: PNG of a small picture, JPEG of a large one made smaller; empty without one.
        size: (width, height) of the picture as recorded, None without one.
        column: of its class, or UNSCORED.
        said: speaker ("human", "assistant", or "" for a caption) and text of every turn.
    """

    key: str
    shard: str
    picture: bytes
    size: tuple[int, int] | None
    column: int
    said: tuple[tuple[str, str], ...]


def draw_samples(
    stream: TaskStream,
    task: Task,
    part: Part,
    count: int,
    *,
    seed: int = 0,
    cache: Path | None = None,
    cache_limit: int | None = None,
    allow_pipes: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[DrawnSample]:
    """Draw samples of a part of a task from up to ``count`` of its shards.

    What cannot be read is passed over for another; so there are fewer than asked for where a part
    is small or mostly broken.

    Args:
        stream: whose task it is.
        task: task, probe, or the rows of a source.
        part: of the task.
        count: samples wanted.
        seed: of the choice.
        cache: see ``prepare``.
        cache_limit: see ``prepare``.
        allow_pipes: see ``prepare``.
        max_pixels: of the largest picture that is decoded.
    """
    group = zlib.crc32(f"{part}/{task.name}".encode("utf-8", "surrogatepass"))
    draw = np.random.default_rng([seed, group])
    names = task.train if part == "train" else task.test
    readers: list[Reader] = []
    opened = Place(cache or default_cache(), cache_limit, allow_pipes)
    for place in draw.permutation(len(names))[:count].tolist():
        try:
            url = stream.shard(names[place])
            reader = Reader([open_shard(names[place], url, opened)[1]])
        except (BadShard, OSError):
            continue
        readers += [reader] * (len(reader) > 0)
    found: list[DrawnSample] = []
    for reader, place in _chosen(readers, count, draw):
        if len(found) == count:
            break
        try:
            found.append(_drawn(reader, place, task, max_pixels))
        except (BadSample, RuntimeError):
            continue
    return found


def _chosen(
    readers: list[Reader], count: int, draw: np.random.Generator
) -> Iterator[tuple[Reader, int]]:
    """Give places in turn from every shard, some more than ``count`` in case some are bad."""
    if not readers:
        return
    each = _TRIES * -(-count // len(readers))
    places = [
        draw.choice(len(reader), min(each, len(reader)), replace=False).tolist()
        for reader in readers
    ]
    for turn in range(each):
        for reader, own in zip(readers, places, strict=True):
            if turn < len(own):
                yield reader, own[turn]


def _drawn(reader: Reader, place: int, task: Task, max_pixels: int) -> DrawnSample:
    sample = reader.read(place)
    looked = look_at(sample, task, max_pixels)
    said: tuple[tuple[str, str], ...] = ()
    if isinstance(looked.text, Dialogue):
        said = tuple(
            (turn.speaker, turn.text.replace(PICTURE, "").strip()) for turn in looked.text.turns
        )
    elif looked.text is not None:
        said = (("", looked.text),)
    picture, size = b"", None
    if looked.pixels is not None:
        picture = small_picture(looked.pixels)
        size = looked.pixels.shape[2], looked.pixels.shape[1]
    return DrawnSample(sample.key, sample.shard, picture, size, looked.label, said)


def small_picture(pixels: Tensor) -> bytes:
    """Encode (3, H, W) uint8 pixels for a page: at most 320 wide and high.

    Returns:
        PNG of a picture that is small already, JPEG of others.
    """
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    is_small = max(picture.size) <= _PIXEL_ART_SIDE
    picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    if is_small:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()
