"""Search for samples of new tasks among those that a card has already, for ``--append``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmcl.core import Task, TaskStream
from mmcl.data.convert.record import ProgressFn
from mmcl.data.convert.scan import images_digest, members_hash
from mmcl.data.convert.task_split import TaskSplits
from mmcl.data.image_formats import image_members, is_numbered
from mmcl.data.remote.location import default_cache, is_remote
from mmcl.data.shards.open_stream import OpenOptions, display_name, open_shard, shard_names
from mmcl.data.shards.reader import Shard
from mmcl.data.shards.tar_index import IMAGES
from mmcl.data.shards.tar_shard import TarShard
from mmcl.data.stored_sample import BadSample, BadShard, IntArray

_SHOWN = 5


@dataclass(frozen=True)
class _Wanted:
    """New samples with an image: sorted distinct hashes of images, of samples, and lengths."""

    images: npt.NDArray[np.uint64]
    samples: npt.NDArray[np.uint64]
    lengths: IntArray


def shared_images(
    card: Path | None, tasks: Sequence[TaskSplits], allow_duplicates: bool, progress: ProgressFn
) -> list[str]:
    """Compare the images of new tasks with those of the other tasks of a card, byte for byte.

    Every local shard of the card is read once: only the images that are as long as a new one.

    Args:
        card: to which the tasks are appended; tasks of their names are left out, as they are
            written again; None = nothing to compare with.
        tasks: new tasks.
        allow_duplicates: do not refuse a task whose samples are all known.
        progress: called after every shard.

    Returns:
        A sentence for each pair of tasks that share images.

    Raises:
        ValueError: if all samples of a new task, images and texts, are those of one old task.
    """
    if card is None:
        return []
    stream = TaskStream.read(card)
    names = {task.name for task in tasks}
    old = [task for task in stream.all_tasks if task.name not in names]
    wanted = {task.name: _wanted(task) for task in tasks}
    wanted = {name: one for name, one in wanted.items() if len(one.images)}
    own_lengths = (each.lengths for each in wanted.values())
    lengths = np.unique(np.concatenate([np.zeros(0, np.int64), *own_lengths]))
    notes: list[str] = []
    skipped: list[str] = []
    for number, task in enumerate(old if wanted else (), start=1):
        images, samples = _found(stream, task, lengths, skipped)
        for name, own in wanted.items():
            shared = len(np.intersect1d(own.images, images))
            if not shared:
                continue
            if np.isin(own.samples, samples).all() and not allow_duplicates:
                raise ValueError(
                    f"all {len(own.images):,} images of task {name!r} and their texts are those of "
                    f"{display_name(task)} on {card}: give --allow_duplicates to append them again"
                )
            notes.append(
                f"{shared:,} of {len(own.images):,} images of task {name!r} are also in "
                f"{display_name(task)}"
            )
        progress("comparing with the card", number, len(old))
    return notes + _not_compared(skipped)


def _not_compared(shards: Sequence[str]) -> list[str]:
    more = f" and {len(shards) - _SHOWN:,} more" if len(shards) > _SHOWN else ""
    return [f"not compared with the card: {', '.join(shards[:_SHOWN])}{more}"] if shards else []


def _wanted(task: TaskSplits) -> _Wanted:
    splits = (task.train, task.test)
    has_image = [split.scan.image_bytes[split.numbers] > 0 for split in splits]
    own = [split.numbers[chosen] for split, chosen in zip(splits, has_image, strict=True)]
    pairs = list(zip(splits, own, strict=True))
    return _Wanted(
        np.unique(np.concatenate([split.scan.content[numbers] for split, numbers in pairs])),
        np.unique(np.concatenate([split.scan.sample[numbers] for split, numbers in pairs])),
        np.unique(np.concatenate([split.scan.image_bytes[numbers] for split, numbers in pairs])),
    )


def _found(
    stream: TaskStream, task: Task, lengths: IntArray, skipped: list[str]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return hashes of the images and samples of a task whose image has one of these lengths."""
    images: list[int] = []
    samples: list[int] = []
    for name in dict.fromkeys((*shard_names(task, "train"), *shard_names(task, "test"))):
        url = stream.shard(name)
        try:
            if is_remote(url):
                raise BadShard("is remote")
            for members in _samples(open_shard(name, url, OpenOptions(default_cache())), lengths):
                digest = images_digest([members[name] for name in image_members(members)])
                images.append(int.from_bytes(digest[:8], "big"))
                samples.append(members_hash(members, digest))
        except (BadShard, OSError, RuntimeError) as error:
            skipped.append(f"{name} ({str(error)[:80]})")
    return np.array(images, dtype=np.uint64), np.array(samples, dtype=np.uint64)


def _samples(shard: Shard, lengths: IntArray) -> Iterator[Mapping[str, bytes]]:
    """Yield the members of the samples of a shard whose image has one of some lengths."""
    indices: Collection[int] = range(len(shard))
    if isinstance(shard, TarShard):
        found = shard.index
        numbered = [name for name in found.extensions if is_numbered(name)]
        # A sample has one image of a plain extension, or several that are numbered.
        plain = np.max([found.lengths(kind) for kind in IMAGES], axis=0)
        several = sum((found.lengths(name) for name in numbered), np.zeros_like(plain))
        image_bytes = np.where(plain > 0, plain, several)
        indices = np.flatnonzero(np.isin(image_bytes, lengths)).tolist()
    for index in indices:
        try:
            members = shard.read(index).members
        except BadSample:
            continue
        if image_members(members):
            yield members
