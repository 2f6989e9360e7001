"""Loaders that visit every sample once, in order: test, validation, and ``end_task``'s pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import Batch, Task, Transform
from mmcl.core.seeding import hash_priorities, hash_seed
from mmcl.data.batches.caption_member import text_member
from mmcl.data.batches.collate import (
    Example,
    PreparedExample,
    collate,
    finish_example,
    make_pairs,
    prepare_ahead,
    prepare_example,
)
from mmcl.data.batches.shared_memory import ImageStack, make_dataloader
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.shards.llava_json import expect_scorable
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import Reader
from mmcl.data.stored_sample import BadSample, IntArray, Sample, Split


@dataclass(frozen=True)
class _WorkerResult:
    """Batch that a worker made, None if no sample of it could be read; and the errors met."""

    batch: Batch | None
    errors: tuple[str, ...]


class EvalLoader:
    """Loader of one rank's batches, each sample once; can be iterated again and again.

    At evaluation a sample gives one pair of image and text for each of its captions, and a batch
    of more pairs than its size is cut.

    The samples are cut into global batches of nearly equal size, the same number on every rank, and
    each is split over the ranks by stride. Bad samples are left out and named in ``Batch.errors``.
    A batch without a readable sample is left out as well and its errors go to a neighboring batch,
    so a pass may give fewer batches than its length.

    Args:
        loader: gives a worker's result for each batch.
        name: name of the split, for messages.
        size: samples or pairs of a batch, at most; None = batches are not cut.
    """

    def __init__(self, loader: DataLoader[Batch], name: str, size: int | None = None) -> None:
        self.loader = loader
        self.name = name
        self.size = size

    def __len__(self) -> int:
        """Return the number of batches if every one has a readable sample.

        Raises:
            TypeError: if samples may have several captions, which are counted when they are read.
        """
        if self.size is not None:
            raise TypeError(f"{self.name} has a batch for every {self.size} captions, not counted")
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        waiting: Batch | None = None
        errors: tuple[str, ...] = ()
        for result in self.loader:
            errors += result.errors
            if result.batch is not None:
                if waiting is not None:
                    yield from self._cut(waiting)
                waiting, errors = replace(result.batch, errors=errors), ()
        if waiting is not None:
            yield from self._cut(replace(waiting, errors=waiting.errors + errors))
        elif errors:
            raise ValueError(
                f"no sample of {self.name} could be read, {errors[0]} for one: repair its shards"
            )

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        """Yield a batch in parts of nearly equal size, its errors with the first."""
        parts = 1 if self.size is None else -(-len(batch) // self.size)
        if parts == 1:
            yield batch
            return
        for part in range(parts):
            rows = torch.arange(part * len(batch) // parts, (part + 1) * len(batch) // parts)
            own = batch.take(rows)
            yield own if part == 0 else replace(own, errors=())


class _EvalDataset(Dataset[Batch]):
    """Dataset of batches of the requested samples, without the bad ones.

    ``all_captions`` makes a pair of each caption of a sample, else one is drawn; ``scorer`` has to
    accept the answers, "" = any.
    """

    def __init__(
        self, reader: Reader, task: Task, transform: Transform, max_pixels: int,
        all_captions: bool = False, scorer: str = "",
    ) -> None:  # fmt: skip
        self.reader, self.task, self.transform = reader, task, transform
        self.max_pixels, self.all_captions, self.scorer = max_pixels, all_captions, scorer

    def __getitems__(self, numbers: IntArray) -> _WorkerResult:
        return self.make(numbers)

    def make(self, numbers: IntArray, room: Tensor | None = None) -> _WorkerResult:
        examples: list[Example] = []
        errors: list[str] = []
        stack = ImageStack(len(numbers), room)
        for number, prepared in prepare_ahead(numbers.tolist(), self._prepare):
            try:
                examples += self._examples(number, prepared, stack)
            except BadSample as bad:
                errors.append(f"{self.reader.describe(number)}: {bad}")
        batch = collate(examples, stack=stack) if examples else None
        return _WorkerResult(batch, tuple(errors))

    def _prepare(self, number: int) -> Sample | PreparedExample:
        """Return the prepared example of a sample; itself where its captions are all wanted."""
        sample = self.reader.read(number)
        if self.all_captions:
            return sample
        if self.scorer:
            expect_scorable(sample.members["json"], self.scorer)
        return prepare_example(sample, number, self.task, seed=self._seed(number))

    def _examples(
        self, number: int, prepared: Sample | PreparedExample | BadSample, stack: ImageStack
    ) -> list[Example]:
        if isinstance(prepared, BadSample):
            raise prepared
        if isinstance(prepared, PreparedExample):
            return [finish_example(prepared, self.transform, self.max_pixels, stack)]
        pairs = make_pairs(
            prepared, number, self.task, self.transform, seed=self._seed(number),
            max_pixels=self.max_pixels,
        )  # fmt: skip
        return [pair._replace(processed=stack.place(pair.processed)) for pair in pairs]

    def _seed(self, number: int) -> int:
        return hash_seed(0, self.task.index, number)


class DistributedSequentialSampler(Sampler[IntArray]):
    """Sampler of one rank's batches of an ordered pass: a stride of each global batch.

    Args:
        numbers: samples of the pass.
        batch: samples of one rank's batch, at most.
        rank: rank of this process.
        world: number of processes.
        in_ranges: give every rank a range of the samples instead, in as many batches: then it
            reads shards of its own.
    """

    def __init__(
        self, numbers: range | IntArray, batch: int, rank: int, world: int, in_ranges: bool = False
    ) -> None:
        self.steps = -(-len(numbers) // (batch * world))
        self.rank, self.world = rank, world
        if in_ranges:
            start, end = (edge * len(numbers) // world for edge in (rank, rank + 1))
            numbers, self.rank, self.world = numbers[start:end], 0, 1
        self.numbers = numbers

    def _stride(self, step: int) -> IntArray:
        start, end = (edge * len(self.numbers) // self.steps for edge in (step, step + 1))
        return np.asarray(self.numbers[start + self.rank : end : self.world], dtype=np.int64)

    def __len__(self) -> int:
        return sum(len(self._stride(step)) > 0 for step in range(self.steps))

    def __iter__(self) -> Iterator[IntArray]:
        strides = (self._stride(step) for step in range(self.steps))
        return (stride for stride in strides if len(stride))


def eval_loader(
    prepared: OpenStream, column: int, transform: Transform, *, batch: int, rank: int = 0,
    world: int = 1, workers: int = 0, max_pixels: int = MAX_PIXELS, split: Split = "test",
    few: int | None = None, in_ranges: bool = False,
) -> EvalLoader:  # fmt: skip
    """Return the loader of a split of a task, in order: the test split for a cell of the matrix.

    The training split is what a strategy's hooks pass over at the end of a task; of a sample with
    several captions it has one, drawn by its number. Elsewhere each caption makes a pair with the
    image, and the loader has no length.

    Args:
        prepared: the stream.
        column: column of the accuracy matrix: a task, or an eval-only task after the tasks.
        transform: the model's transform without augmentation.
        batch: samples or pairs of one rank's batch, at most.
        rank: rank of this process.
        world: number of processes.
        workers: processes that read and decode.
        max_pixels: larger images are bad samples.
        split: train, validation or test.
        few: samples to visit at most, a uniform subset of the split; None = all.
        in_ranges: give every rank a range of the samples if shards are remote, so that it fetches
            only theirs; else a stride of each global batch.

    Raises:
        ValueError: if ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    task, reader = prepared.stream.evaluated_task(column), prepared.reader(column, split)
    numbers = few_of(len(reader), few, column)
    is_pairs = split != "train" and task.task_type in ("captioning", "retrieval")
    scorer = "" if split == "train" else task.scorer
    dataset = _EvalDataset(reader, task, transform, max_pixels, is_pairs, scorer)
    sampler = DistributedSequentialSampler(
        numbers, batch, rank, world, in_ranges and reader.in_windows
    )
    loader = make_dataloader(dataset, sampler, workers, seed=0, stay=False)
    size = batch if is_pairs and text_member(task.text_field) == "json" else None
    return EvalLoader(loader, f"the {split} split of '{task.name}'", size)


def few_of(count: int, few: int | None, task: int) -> range | IntArray:
    """Return 0 to ``count`` - 1, or at most ``few`` of them: a uniform subset, rising."""
    if few is None or few >= count:
        return range(count)
    priorities = hash_priorities(0, task, torch.arange(count))
    numbers: IntArray = priorities.topk(few, largest=False).indices.sort().values.numpy()
    return numbers
