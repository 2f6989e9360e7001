"""Lengths of samples by which batches are grouped: bytes of text and tokens of images.

Nothing is decoded or tokenized: the bytes of a text are in the index of its shard, and the tokens
of an image follow from its height and width, which the first bytes of its file state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from mmcl.core import BadSample, Task
from mmcl.data.batches.batch_plan import Lengths
from mmcl.data.batches.caption_member import text_member
from mmcl.data.decode import size_of
from mmcl.data.shards.reader import SampleReader
from mmcl.data.stored_sample import IntArray

BYTES_PER_TOKEN = 4
"""Bytes of English text that tokenizers make one token of, about."""
_HEAD_BYTES = 1 << 16
"""First bytes of an image file in which its size is looked for before the whole file is read."""


class CountsImageTokens(Protocol):
    """Transform of a model that turns images into tokens of its text."""

    tokens_per_image: int | None
    """Tokens of any image; None = they depend on its size."""

    def image_tokens(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Return the tokens of the images of one sample, given their (height, width)."""
        ...


@dataclass
class EntryLengths:
    """Lengths of the entries of batches in bytes of text, a token of an image as four.

    Image files are read when the length of their sample is first needed, so once, and a window of
    batches at a time. An image that cannot be read counts nothing: its sample is
    replaced.

    Attributes:
        text: (entries,) bytes of text of each.
        locate: returns the reader of an entry, and its number there.
        transform: of the model.
    """

    text: IntArray
    locate: Callable[[int], tuple[SampleReader, int]]
    transform: CountsImageTokens
    _known: IntArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Mark all lengths as unknown."""
        self._known = np.full(len(self.text), -1, dtype=np.int64)

    def __getitem__(self, entries: IntArray) -> IntArray:
        """Return the lengths (n,) of n entries."""
        for entry in np.unique(entries[self._known[entries] < 0]).tolist():
            tokens = self._image_tokens(*self.locate(entry))
            self._known[entry] = int(self.text[entry]) + BYTES_PER_TOKEN * tokens
        lengths: IntArray = self._known[entries]
        return lengths

    def _image_tokens(self, reader: SampleReader, number: int) -> int:
        fixed = self.transform.tokens_per_image
        try:
            if fixed is not None:
                return fixed * len(reader.image_heads(number, 0))
            return self.transform.image_tokens(image_sizes(reader, number))
        except BadSample:
            return 0


def image_sizes(reader: SampleReader, number: int) -> list[tuple[int, int]]:
    """Return height and width of each image of a sample by their headers.

    Raises:
        BadSample: if an image is missing, or its header cannot be read.
    """
    try:
        return [size_of(head) for head in reader.image_heads(number, _HEAD_BYTES)]
    except BadSample:  # an Exif thumbnail may stand before the header
        return [size_of(data) for data in reader.image_heads(number, None)]


def entry_lengths(dataset: Any, new: IntArray | None) -> Lengths:
    """Return the lengths of all entries of a task's batches, in the order of entries.

    Images count where the model turns them into tokens and no shard is remote.

    Args:
        dataset: a ``TrainDataset``.
        new: numbers of the new samples that are counted, None = all. With lanes those of this
            rank's lanes: lanes are sorted one by one, so the others, which are 0, change nothing
            that this rank reads.
    """
    text = np.concatenate([_new(dataset, new), _replayed(dataset), *_sources(dataset)])
    task, readers = dataset.tasks[dataset.task], [dataset.reader, *dataset.source_readers]
    if not hasattr(dataset.transform, "image_tokens"):
        return text
    if any(reader.is_remote for reader in (*readers, *dataset.replayed.readers.values())):
        warnings.warn(
            f"group_by_length counts texts alone in task '{task.name}': some shards are remote, "
            "and the sizes of their images are not known before they are fetched",
            stacklevel=2,
        )
        return text
    return EntryLengths(text, dataset.reader_of, cast(CountsImageTokens, dataset.transform))


def _new(dataset: Any, new: IntArray | None) -> IntArray:
    lengths = np.zeros(len(dataset.reader), dtype=np.int64)
    own = slice(None) if new is None else new
    lengths[own] = _text_bytes(dataset.reader, dataset.tasks[dataset.task], new)
    return lengths


def _replayed(dataset: Any) -> IntArray:
    replayed = dataset.replayed
    lengths = np.zeros(len(replayed.task_ids), dtype=np.int64)
    for task, reader in replayed.readers.items():
        of_task = replayed.task_ids == task
        lengths[of_task] = _text_bytes(reader, dataset.tasks[task], replayed.sample_ids[of_task])
    return lengths


def _sources(dataset: Any) -> list[IntArray]:
    pairs = zip(dataset.sources, dataset.source_readers, strict=True)
    return [_text_bytes(reader, source.task) for source, reader in pairs]


def _text_bytes(reader: SampleReader, task: Task, numbers: IntArray | None = None) -> IntArray:
    is_conversation = task.task_type == "instruction"
    return reader.text_bytes("json" if is_conversation else text_member(task.text_field), numbers)
