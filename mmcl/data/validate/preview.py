"""Preview of a stream: random samples of every task, decoded as in training, as thumbnails."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from mmcl.core import IMAGE_TOKEN, Conversation, Pixels, Task, TaskStream, Turn, each_image
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.remote.location import default_cache
from mmcl.data.shards.open_stream import OpenOptions, open_shard, shard_names
from mmcl.data.shards.reader import Reader
from mmcl.data.shards.sample_fields import SampleFields
from mmcl.data.stored_sample import BadSample, BadShard, Split
from mmcl.data.validate.shard_check import decode_as_training

_LARGEST_SIDE = 320
_PIXEL_ART_SIDE = 96
"""Images up to here are kept as they are, pixel for pixel."""

_TRIES = 4


@dataclass(frozen=True)
class DrawnSample:
    """Sample of a preview.

    Attributes:
        key: its name.
        shard: name of its shard.
        thumbnail: thumbnail of its image, PNG of a small one, JPEG of others; empty without one.
        size: (width, height) of the image itself, None without one.
        column: of its class, or IGNORE_INDEX.
        turns: role ("user", "assistant", or "" for a caption) and text of every turn.
    """

    key: str
    shard: str
    thumbnail: bytes
    size: tuple[int, int] | None
    column: int
    turns: tuple[tuple[str, str], ...]


def draw_samples(
    stream: TaskStream,
    task: Task,
    split: Split,
    count: int,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    cache_limit: int | None = None,
    allow_pipes: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[DrawnSample]:
    """Draw random samples of a split from up to ``count`` of its shards.

    A sample that cannot be read is replaced by another, so there are fewer than ``count`` only
    where a split is small or mostly broken.

    Args:
        stream: whose task it is.
        task: task, eval-only task, or the samples of a source.
        split: split of the task.
        count: samples to draw.
        seed: of the draw.
        cache_dir: see ``open_stream``.
        cache_limit: see ``open_stream``.
        allow_pipes: see ``open_stream``.
        max_pixels: of the largest image that is decoded.
    """
    group = zlib.crc32(f"{split}/{task.name}".encode("utf-8", "surrogatepass"))
    draw = np.random.default_rng([seed, group])
    names = shard_names(task, split)
    readers: list[Reader] = []
    options = OpenOptions(
        cache_dir or default_cache(), cache_limit, allow_pipes, key_until=task.key_until
    )
    for index in draw.permutation(len(names))[:count].tolist():
        try:
            shard = open_shard(names[index], stream.shard(names[index]), options)
            readers.append(Reader([shard], fields=SampleFields.of(task)))
        except (BadShard, OSError):
            continue
    found: list[DrawnSample] = []
    for reader, index in _chosen(readers, count, draw):
        if len(found) == count:
            break
        try:
            found.append(_drawn(reader, index, task, max_pixels))
        except (BadSample, RuntimeError):
            continue
    return found


def _chosen(
    readers: list[Reader], count: int, draw: np.random.Generator
) -> Iterator[tuple[Reader, int]]:
    """Yield sample indices in turn from every shard, more than ``count`` in case some are bad."""
    if not readers:
        return
    each = _TRIES * -(-count // len(readers))
    drawn = [
        [(reader, index) for index in draw.choice(len(reader), count, replace=False).tolist()]
        for reader, count in ((reader, min(each, len(reader))) for reader in readers)
    ]
    for turn in zip_longest(*drawn):
        yield from filter(None, turn)


def _drawn(reader: Reader, index: int, task: Task, max_pixels: int) -> DrawnSample:
    sample = reader.read(index)
    decoded = decode_as_training(sample, task, max_pixels)
    turns: tuple[tuple[str, str], ...] = ()
    if isinstance(decoded.text, Conversation):
        turns = tuple((turn.role, _shown(turn)) for turn in decoded.text.turns)
    elif decoded.text is not None:
        turns = (("", decoded.text),)
    thumbnail, size = b"", None
    shown = side_by_side(decoded.pixels)
    if shown is not None:
        thumbnail = make_thumbnail(shown)
        first = each_image(decoded.pixels)[0]
        size = first.shape[2], first.shape[1]
    return DrawnSample(sample.key, sample.shard, thumbnail, size, decoded.label, turns)


def _shown(turn: Turn) -> str:
    """Return the text of a turn; an image token of an answer is plain text."""
    text = turn.text.replace(IMAGE_TOKEN, "") if turn.role == "user" else turn.text
    return text.strip()


def side_by_side(pixels: Pixels) -> Tensor | None:
    """Return the images of a sample as one (3, H, W) uint8, on white where they are lower."""
    images = each_image(pixels)
    height = max((image.shape[1] for image in images), default=0)
    whole = [pad(image, (0, 0, 0, height - image.shape[1]), value=255) for image in images]
    return torch.cat(whole, dim=2) if whole else None


def make_thumbnail(pixels: Tensor) -> bytes:
    """Encode (3, H, W) uint8 pixels as a thumbnail of at most 320 x 320.

    Returns:
        PNG of an image that is small already, JPEG of others.
    """
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    is_small = max(image.size) <= _PIXEL_ART_SIDE
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
    file = io.BytesIO()
    if is_small:
        image.save(file, "PNG", optimize=True)
    else:
        image.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue()
