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
from mmcl.data.batches.collate import Example, collate, make_example
from mmcl.data.batches.shared_memory import make_dataloader
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.shards.llava_json import expect_scorable
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import Reader
from mmcl.data.stored_sample import BadSample, IntArray, Split


@dataclass(frozen=True)
class _WorkerResult:
    """Batch that a worker made, None if no sample of it could be read; and the errors met."""

    batch: Batch | None
    errors: tuple[str, ...]


class EvalLoader:
    """Loader of one rank's batches, each sample once; can be iterated again and again.

    The samples are cut into global batches of nearly equal size, the same number on every rank, and
    each is split over the ranks by stride. Bad samples are left out and named in ``Batch.errors``.
    A batch without a readable sample is left out as well and its errors go to a neighboring batch,
    so a pass may give fewer batches than its length.

    Args:
        loader: gives a worker's result for each batch.
        name: name of the split, for messages.
    """

    def __init__(self, loader: DataLoader[Batch], name: str) -> None:
        self.loader = loader
        self.name = name

    def __len__(self) -> int:
        """Return the number of batches if every one has a readable sample."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        waiting: Batch | None = None
        errors: tuple[str, ...] = ()
        for result in self.loader:
            errors += result.errors
            if result.batch is not None:
                if waiting is not None:
                    yield waiting
                waiting, errors = replace(result.batch, errors=errors), ()
        if waiting is not None:
            yield replace(waiting, errors=waiting.errors + errors)
        elif errors:
            raise ValueError(
                f"no sample of {self.name} could be read, {errors[0]} for one: repair its shards"
            )


class _EvalDataset(Dataset[Batch]):
    """Dataset of batches of the requested samples, without the bad ones.

    ``scorer`` has to accept their answers, "" = any.
    """

    def __init__(
        self, reader: Reader, task: Task, transform: Transform, max_pixels: int, scorer: str = ""
    ) -> None:
        self.reader, self.task, self.transform = reader, task, transform
        self.max_pixels, self.scorer = max_pixels, scorer

    def __getitems__(self, numbers: IntArray) -> _WorkerResult:
        return self.make(numbers)

    def make(self, numbers: IntArray, room: Tensor | None = None) -> _WorkerResult:
        examples: list[Example] = []
        errors: list[str] = []
        for number in numbers.tolist():
            try:
                sample = self.reader.read(number)
                example = make_example(
                    sample, number, self.task, self.transform,
                    seed=hash_seed(0, self.task.index, number), max_pixels=self.max_pixels,
                )  # fmt: skip
                if self.scorer:
                    expect_scorable(sample.members["json"], self.scorer)
                examples.append(example)
            except BadSample as bad:
                errors.append(f"{self.reader.describe(number)}: {bad}")
        return _WorkerResult(collate(examples, room=room) if examples else None, tuple(errors))


class DistributedSequentialSampler(Sampler[IntArray]):
    """Sampler of one rank's stride of each global batch of an ordered pass."""

    def __init__(self, numbers: range | IntArray, batch: int, rank: int, world: int) -> None:
        self.numbers = numbers
        self.steps = -(-len(numbers) // (batch * world))
        self.rank = rank
        self.world = world

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
    few: int | None = None,
) -> EvalLoader:  # fmt: skip
    """Return the loader of a split of a task, in order: the test split for a cell of the matrix.

    The training split is what a strategy's hooks pass over at the end of a task.

    Args:
        prepared: the stream.
        column: column of the accuracy matrix: a task, or an eval-only task after the tasks.
        transform: the model's transform without augmentation.
        batch: samples of one rank's batch, at most.
        rank: rank of this process.
        world: number of processes.
        workers: processes that read and decode.
        max_pixels: larger images are bad samples.
        split: train, validation or test.
        few: samples to visit at most, a uniform subset of the split; None = all.

    Raises:
        ValueError: if ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}, expected at least 1")
    task, reader = prepared.stream.evaluated_task(column), prepared.reader(column, split)
    numbers = few_of(len(reader), few, column)
    scorer = "" if split == "train" else task.scorer
    dataset = _EvalDataset(reader, task, transform, max_pixels, scorer)
    sampler = DistributedSequentialSampler(numbers, batch, rank, world)
    loader = make_dataloader(dataset, sampler, workers, seed=0, stay=False)
    return EvalLoader(loader, f"the {split} split of '{task.name}'")


def few_of(count: int, few: int | None, task: int) -> range | IntArray:
    """Return 0 to ``count`` - 1, or at most ``few`` of them: a uniform subset, rising."""
    if few is None or few >= count:
        return range(count)
    priorities = hash_priorities(0, task, torch.arange(count))
    numbers: IntArray = priorities.topk(few, largest=False).indices.sort().values.numpy()
    return numbers
