"""Loaders for a loop of one's own: replay over any map-style dataset, and the exact pass."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmcl.core import VLM, Batch, Strategy, device_of
from mmcl.core.distributed import rank_and_world
from mmcl.core.seeding import hash_seed
from mmcl.data.batches.batch_plan import EpochPlan, Mixture
from mmcl.data.batches.dataset_collate import (
    ImageCaptionCollate,
    ImageLabelCollate,
    collate_images,
)
from mmcl.data.batches.eval_loader import DistributedSequentialSampler, few_of
from mmcl.data.batches.train_loader import BatchRequest, ResumableBatchSampler
from mmcl.data.stored_sample import IntArray

_PREVIEWED = 1024
"""Samples of a task that a strategy may see before its replay plan is used."""
Collate = Callable[[list[Any]], Any]


class MapDataset(Protocol):
    """Protocol of a map-style dataset: a length, and items by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def replay_loader(
    dataset: MapDataset,
    strategy: Strategy,
    batch_size: int,
    *,
    earlier: Sequence[MapDataset] = (),
    collate_fn: Collate = collate_images,
    eval_collate_fn: Collate | None = None,
    model: VLM | None = None,
    num_workers: int = 0,
    seed: int = 0,
) -> ReplayLoader:
    """Return a training loader that mixes the samples of a strategy's replay plan into a task.

    Every global batch has the plan's exact ratio of replayed samples; every new sample comes once
    in an epoch. An old sample is read from its own dataset again, so it is augmented afresh. A
    batch has ``task_ids``, ``sample_ids`` (positions in a task's dataset) and ``is_replay``.

    Order and augmentation are functions of (seed, task, epoch, sample): torch's, numpy's and
    Python's generators are seeded before every item is read, and restored after. Lightning stores
    the loader's position in its checkpoints.

    Args:
        dataset: of the task in training; item i is always the same sample.
        strategy: attached to the model; its task must have begun when the loader is first used.
        batch_size: samples of a batch on each process, replayed ones included.
        earlier: datasets of tasks 0, 1, ... before this one; needed for the tasks that are
            replayed. A class keeps its label in all of them.
        collate_fn: a list of items -> ``Batch``.
        eval_collate_fn: the same without augmentation, for the pass at the task's end; None =
            ``collate_fn``.
        model: needed by a strategy whose plan depends on the new samples, of which it is shown
            1,024: ``ExperienceReplay(allocation="inscl")``.
        num_workers: processes that read items, 0 = this process.
        seed: of order and augmentation.

    Raises:
        ValueError: on first use, if the plan names a task that ``earlier`` lacks, or a sample that
            its dataset lacks, or a process would get no samples. RuntimeError if no task has begun.
    """
    if batch_size < 1 or not len(dataset):
        raise ValueError(
            f"batch_size is {batch_size} and dataset has {len(dataset)} samples: give 1 or more"
        )
    items = _ItemBatches([*earlier, dataset], collate_fn, seed)
    return ReplayLoader(
        items, strategy, model, batch_size, eval_collate_fn or collate_fn, num_workers
    )


class ReplayLoader:
    """Loader of a task's batches with replayed samples mixed in; see ``replay_loader``.

    Args:
        items: makes the batches.
        strategy: gives the replay plan.
        model: for the strategy's ``preview``.
        batch_size: samples of a batch on each process.
        eval_collate_fn: for ``task_pass``.
        num_workers: processes that read items.
    """

    def __init__(
        self, items: _ItemBatches, strategy: Strategy, model: VLM | None, batch_size: int,
        eval_collate_fn: Collate, num_workers: int,
    ) -> None:  # fmt: skip
        self.items, self.strategy, self.model, self.batch_size = items, strategy, model, batch_size
        self.eval_collate_fn, self.num_workers = eval_collate_fn, num_workers
        self._mixture: Mixture | None = None
        self._next = (0, 0)  # epoch, and batches of it that are left out
        self._now = (0, 0)  # epoch, and batches of it that were given

    @property
    def sampler(self) -> ReplayLoader:
        """The loader itself: Lightning calls ``loader.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; without a call it counts up from 0."""
        if epoch != self._next[0]:
            self._next = (epoch, 0)

    def state_dict(self) -> dict[str, int]:
        """Return the position: the epoch, and the batches of it that were given."""
        return {"epoch": self._now[0], "batches": self._now[1]}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the batches that were given."""
        self._next = self._now = (state["epoch"], state["batches"])

    def __len__(self) -> int:
        """Return the number of batches of an epoch, the same on every process."""
        return self._mixture_of_task().steps

    def __iter__(self) -> Iterator[Batch]:
        mixture, task = self._mixture_of_task(), self.items.task
        epoch, done = self._next
        epoch, done = epoch + done // mixture.steps, done % mixture.steps
        self._next, self._now = (epoch + 1, 0), (epoch, done)
        rank, world = rank_and_world()

        def plan(epoch: int) -> EpochPlan:
            return EpochPlan(mixture, seed=self.items.seed, task=task, epoch=epoch)

        requests = ResumableBatchSampler(
            plan, mixture.steps, lambda: (epoch, done),
            composition=lambda entries: (int((entries < mixture.new).sum()), 0),
            accumulation=1, rank=rank, world=world,
        )  # fmt: skip
        start = done
        for count, batch in enumerate(_loader(self.items, requests, self.num_workers), start + 1):
            self._now = (epoch, count)
            yield batch

    def task_pass(self, few: int | None = None) -> TaskPass:
        """Return the exact pass over the task's own samples that ``end_task`` is given.

        Args:
            few: number of samples, a uniform subset; None = all.
        """
        task = self.strategy.current_task
        return TaskPass(
            self.items.datasets[-1], self.eval_collate_fn, self.batch_size, few=few,
            task=0 if task is None else task.index, num_workers=self.num_workers,
        )  # fmt: skip

    def _mixture_of_task(self) -> Mixture:
        """Get the replay plan on the first call, and check it."""
        if self._mixture is not None:
            return self._mixture
        task = self.strategy.current_task
        if task is None:
            raise RuntimeError(
                "the loader was used before the task began: call mmcl.begin_task(model, strategy, "
                "task) first, or give the Trainer callbacks=[mmcl.StrategyCallback()]"
            )
        *earlier, dataset = self.items.datasets
        if self.strategy.overrides("preview") and self.model is not None:
            device = device_of(self.model)
            shown = (batch.to(device) for batch in self.task_pass(few=_PREVIEWED))
            self.strategy.preview(self.model, task, shown)
        plan, world = self.strategy.replay_plan(), rank_and_world()[1]
        if plan is not None and len(plan):
            _check_plan(plan.task_ids, plan.sample_ids, earlier, task.index)
            self.items.replayed = (plan.task_ids.numpy(), plan.sample_ids.numpy())
        self.items.datasets = [*earlier, *[()] * (task.index - len(earlier)), dataset]
        mixture = Mixture(
            len(dataset), self.batch_size * world, len(self.items.replayed[0]),
            None if plan is None else plan.replay_ratio,
        )  # fmt: skip
        if mixture.min_batch < world:
            raise ValueError(
                f"a batch of {mixture.min_batch} of the dataset's {len(dataset)} samples leaves "
                f"some of {world} processes without one: use fewer processes or a larger batch_size"
            )
        self._mixture = mixture
        return mixture


class TaskPass:
    """One pass over a dataset in order, each sample once; a rank's stride of every batch.

    What ``end_task`` is given: sample i of the dataset has ``sample_ids`` i, and rank r of W reads
    samples r, r + W, ... of every W * ``batch_size``.

    Args:
        dataset: of one task.
        collate_fn: a list of items -> ``Batch``, without augmentation.
        batch_size: samples of a batch on each process.
        task: index of the task.
        num_workers: processes that read items.
        few: samples to visit at most, a uniform subset; None = all.
        indices: positions of the task's samples in the dataset, rising; None = all of them.
    """

    def __init__(
        self, dataset: MapDataset, collate_fn: Collate, batch_size: int, *, task: int,
        num_workers: int = 0, few: int | None = None, indices: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.items = _ItemBatches([*[()] * task, dataset], collate_fn, seed=0)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.numbers = few_of(len(dataset), few, task)
        if indices is not None:
            self.numbers = np.asarray(indices, dtype=np.int64)

    def _requests(self) -> DistributedSequentialSampler:
        return DistributedSequentialSampler(self.numbers, self.batch_size, *rank_and_world())

    def __len__(self) -> int:
        """Return the number of this process's batches."""
        return len(self._requests())

    def __iter__(self) -> Iterator[Batch]:
        requests = (BatchRequest(0, numbers, 1.0) for numbers in self._requests())
        return iter(_loader(self.items, list(requests), self.num_workers))


@dataclass
class _ItemBatches(Dataset[Batch]):
    """Batches of items: of the last of the datasets, and of a list of samples of all of them.

    Attributes:
        datasets: of each task, the last one in training.
        collate_fn: a list of items -> Batch.
        seed: of augmentation.
        replayed: task and number of each replayed sample.
    """

    datasets: list[Any]
    collate_fn: Collate
    seed: int
    replayed: tuple[IntArray, IntArray] = (np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def task(self) -> int:
        """Index of the task in training."""
        return len(self.datasets) - 1

    def __getitems__(self, request: BatchRequest) -> Batch:
        """Read and collate the samples of a request."""
        new = len(self.datasets[-1])
        is_old = request.entries >= new
        tasks = np.full(len(request.entries), self.task)
        numbers = request.entries.copy()
        tasks[is_old] = self.replayed[0][request.entries[is_old] - new]
        numbers[is_old] = self.replayed[1][request.entries[is_old] - new]
        pairs = list(zip(tasks.tolist(), numbers.tolist(), strict=True))
        seeds = [hash_seed(self.seed, *pair, request.epoch, self.task) for pair in pairs]
        with _restored_generators():
            items = []
            for seed, (task, number) in zip(seeds, pairs, strict=True):
                _seed_generators(seed)
                items.append(self.datasets[task][number])
            _seed_generators(hash_seed(*seeds))
            batch = self._collated(items, seeds)
        return replace(
            batch, task_ids=torch.from_numpy(tasks), sample_ids=torch.from_numpy(numbers),
            is_replay=torch.from_numpy(is_old), loss_weight=request.loss_weight,
            global_batch=request.global_batch,
        )  # fmt: skip

    def _collated(self, items: list[Any], seeds: list[int]) -> Batch:
        collate = self.collate_fn
        if isinstance(collate, ImageCaptionCollate) and collate.all_captions:
            raise ValueError(
                "collate_fn has all_captions=True, which makes several samples of one, and batches "
                "of training are planned in samples: leave it out, so that one caption is drawn"
            )
        if isinstance(collate, ImageLabelCollate | ImageCaptionCollate):
            return collate(items, seeds)
        batch = collate(items)
        if not isinstance(batch, Batch):
            raise TypeError(
                f"collate_fn returned {type(batch).__name__}, expected a mmcl.Batch: use "
                "mmcl.ImageLabelCollate(model.transform(True)), mmcl.collate_images, or return "
                "mmcl.Batch.from_images(images, labels)"
            )
        return batch


def _loader(
    items: _ItemBatches, requests: Iterable[BatchRequest], num_workers: int
) -> DataLoader[Batch]:
    options: Any = {"batch_sampler": requests, "collate_fn": _identity}  # a request is a batch
    return DataLoader(
        items, num_workers=num_workers, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(), **options,
    )  # fmt: skip


def _identity(batch: Batch) -> Batch:
    return batch


def _check_plan(tasks: Tensor, samples: Tensor, earlier: Sequence[Sized], current: int) -> None:
    named = sorted(set(tasks.tolist()))
    if named[-1] >= min(len(earlier), current):
        raise ValueError(
            f"the strategy replays samples of tasks {named} and earlier has {len(earlier)} "
            f"datasets in task {current}: give earlier= the datasets of tasks 0 to {named[-1]}"
        )
    for task in named:
        last = int(samples[tasks == task].max())
        if last >= len(earlier[task]):
            raise ValueError(
                f"the strategy replays sample {last} of task {task} and earlier[{task}] has "
                f"{len(earlier[task])}: give the dataset that the task was trained on, in the same "
                "order"
            )


@contextmanager
def _restored_generators() -> Iterator[None]:
    """Context after which torch's, numpy's and Python's global generators are as before."""
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _seed_generators(seed: int) -> None:
    # Not torch.manual_seed, which seeds the devices as well.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    random.seed(seed)
