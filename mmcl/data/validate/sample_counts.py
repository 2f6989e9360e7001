"""Counts of a stream's samples as a run would meet them: their tokens, and those it cannot use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from mmcl.core import BadSample, Task, Transform
from mmcl.core.seeding import hash_seed
from mmcl.data.batches.collate import Example, make_example
from mmcl.data.batches.eval_loader import few_of
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.shards.llava_json import expect_scorable
from mmcl.data.stored_sample import NAMED, Split

COUNTED = 256
"""Samples of every split that are counted, unless a caller says otherwise."""


@dataclass
class SplitCount:
    """Count of the samples of one split.

    Attributes:
        task: the task, eval-only task or source.
        split: train, validation or test.
        size: samples of the split.
        counted: of these, samples that were counted: all, or a seeded part.
        reader: of the split.
        limit: largest number of tokens that the model takes; None = texts have a fixed length.
        lengths: (number of tokens, number of the sample) of each counted sample with tokens.
        errors: one sentence for each sample that a run leaves out, with its key.
        notes: one sentence for each sample of which a run takes only a part, with its key.
    """

    task: Task
    split: Split
    size: int
    counted: int
    reader: Any = field(repr=False)
    limit: int | None = None
    lengths: list[tuple[int, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def too_long(self) -> int:
        """Number of counted samples with more tokens than the limit."""
        return 0 if self.limit is None else sum(n > self.limit for n, _ in self.lengths)

    @property
    def longest(self) -> int:
        """Largest number of tokens, 0 if no sample has tokens."""
        return max((length for length, _ in self.lengths), default=0)

    def histogram(self, bins: int = 8) -> list[tuple[int, int]]:
        """Return (upper edge, number of samples) of ranges of equal width up to ``longest``."""
        width = max(1, -(-self.longest // bins))
        counts = [0] * bins
        for length, _ in self.lengths:
            counts[max(0, length - 1) // width] += 1
        return [((number + 1) * width, count) for number, count in enumerate(counts)]

    def refusal(self, max_bad_fraction: float, visited: int) -> str:
        """Return why a run that visits ``visited`` of the samples would end, "" if it would not.

        From a part of the samples two bad ones are taken for a sign, one is not.
        """
        bad = len(self.errors)
        expected = bad / max(1, self.counted) * min(visited, self.size)
        is_sign = bad > 1 or (bad == 1 and self.counted == self.size)
        if not is_sign or expected <= max_bad_fraction * max(1, self.size):
            return ""
        tried = "" if self.counted == self.size else f" that were tried, of {self.size}"
        return (
            f"{bad} of {self.counted} {self.split} samples of '{self.task.name}'{tried} cannot be "
            f"used, and data.max_bad_fraction={max_bad_fraction:g} allows "
            f"{int(max_bad_fraction * max(1, self.size))}: {'; '.join(self.errors[:NAMED])}"
        )


def count_samples(
    prepared: Any, make_transform: Callable[[bool], Transform], samples: int | None = COUNTED
) -> list[SplitCount]:
    """Count the tokens of a stream's samples, and name those that a run cannot use.

    Args:
        prepared: the open stream.
        make_transform: the model's ``transform``: from whether it is for training.
        samples: at most so many of every split, a uniform subset; None = all.
    """
    return [
        _count(task, split, reader, make_transform(split == "train"), samples)
        for task, split, reader in _splits(prepared)
    ]


def longest_examples(
    counts: Sequence[SplitCount], transform: Transform, count: int
) -> list[Example]:
    """Return the ``count`` training samples of most tokens that a run uses, of any task.

    They are numbered as samples of the first task; fewer samples are repeated.
    """
    known = [
        (length, number, each)
        for each in counts
        if each.split == "train"
        for length, number in each.lengths
    ]
    found: list[Example] = []
    for _, number, each in sorted(known, key=lambda one: -one[0]):
        if len(found) == count:
            break
        try:
            example = _example(each.reader, number, each.task, transform)
        except BadSample:
            continue
        found.append(example._replace(task_id=0, sample_id=len(found)))
    return [found[index % len(found)] for index in range(count)] if found else []


def _splits(prepared: Any) -> Iterator[tuple[Task, Split, Any]]:
    """Yield every split that a run reads."""
    for column, task in enumerate(prepared.stream.all_tasks):
        for split in get_args(Split):
            reader = prepared.readers.get((column, split))
            if reader is not None and len(reader):
                yield task, split, reader
    for number, reader in prepared.sources.items():
        yield prepared.stream.sources[number - 1].task, "train", reader


def _count(
    task: Task, split: Split, reader: Any, transform: Transform, samples: int | None
) -> SplitCount:
    numbers = few_of(len(reader), samples, task.index)
    chat = getattr(transform, "chat_tokenizer", None)
    limit = getattr(chat, "max_length", None)
    found = SplitCount(task, split, len(reader), len(numbers), reader, limit)
    whole: Any = transform
    if chat is not None and task.task_type == "instruction":
        whole = replace(whole, chat_tokenizer=replace(chat, max_length=sys.maxsize))
    for number in numbers:
        try:
            example = _example(reader, int(number), task, whole)
            ids = example.processed.input_ids
            if ids is not None and found.limit is not None:
                found.lengths.append((len(ids), int(number)))
                if len(ids) > found.limit:
                    example = _example(reader, int(number), task, transform)
            if split != "train" and task.scorer:
                expect_scorable(reader.read(int(number)).members["json"], task.scorer)
        except BadSample as bad:
            found.errors.append(f"{reader.describe(int(number))}: {bad}")
        else:
            note = example.processed.note
            found.notes += [f"{reader.describe(int(number))}: {note}"] if note else []
    return found


def _example(reader: Any, number: int, task: Task, transform: Transform) -> Example:
    seed = hash_seed(0, task.index, number)
    sample = reader.read(number)
    return make_example(sample, number, task, transform, seed=seed, max_pixels=MAX_PIXELS)
