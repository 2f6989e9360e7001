"""The training loader: batches whose content is a function of (seed, task, epoch, step)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mmcl.core import Batch, ReplayPlan, Task, Transform
from mmcl.core.seeding import generator, hash_seed
from mmcl.data.batches.batch_plan import EpochPlan, Mixture, rank_slice
from mmcl.data.batches.permutation import WindowedShuffle
from mmcl.data.batches.shared_memory import SharedMemoryDataLoader, workers_are_forked
from mmcl.data.batches.train_dataset import BatchRequest, ReplaySamples, TrainDataset
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.protocols import IntArray
from mmcl.data.remote.cache import CachedFile
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import Reader, SampleReader

WINDOW = 16
"""Number of remote shards whose samples are shuffled together."""


def start_position() -> tuple[int, int]:
    """Return the start position of a run: epoch 0, no micro-batch done."""
    return 0, 0


class ResumableBatchSampler(Sampler[BatchRequest]):
    """Resumable batch sampler: the requests of an epoch, from the current position of the run.

    Args:
        plan: called with ``epoch=``, returns the plan of its global batches.
        steps: global batches of an epoch.
        position: called at every ``iter``: (epoch, micro-batches already done in it). An epoch that
            is done to its end counts as the start of the next.
        scored: returns how many of the given entries are in the task loss.
        begins: called with the plan and the number of a global batch before it is requested.
        accumulation: micro-batches of a global batch on every rank.
        rank: rank of this process.
        world: number of processes.
    """

    def __init__(
        self,
        plan: Callable[..., EpochPlan],
        steps: int,
        position: Callable[[], tuple[int, int]],
        scored: Callable[[IntArray], int] = len,
        begins: Callable[[EpochPlan, int], None] = lambda plan, step: None,
        *,
        accumulation: int,
        rank: int,
        world: int,
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.position = position
        self.scored, self.begins = scored, begins
        self.accumulation = accumulation
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole epoch."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, done = self.position()
        epoch, done = epoch + done // len(self), done % len(self)
        plan = self.plan(epoch=epoch)
        slices = self.world * self.accumulation
        for number in range(done, len(self)):
            step, micro_batch = divmod(number, self.accumulation)
            self.begins(plan, step)
            global_batch_size = plan.batch(step)
            entries = rank_slice(
                global_batch_size, micro_batch, self.accumulation, self.rank, self.world
            )
            weight = self.scored(entries) * slices / self.scored(global_batch_size)
            yield BatchRequest(epoch, entries, weight)


def train_loader(
    prepared: OpenStream,
    task: int,
    transform: Transform,
    *,
    replay_plan: ReplayPlan | None, recall_readers: Mapping[int, SampleReader] | None = None,
    global_batch_size: int, accumulation: int = 1, seed: int, rank: int = 0, world: int = 1,
    workers: int = 0, position: Callable[[], tuple[int, int]] = start_position,
    max_pixels: int = MAX_PIXELS, window: int = WINDOW, group: int = 0,
) -> DataLoader[Batch]:  # fmt: skip
    """Build the training loader of a task, with replayed samples and other sources mixed in.

    Its length is the number of micro-batches of an epoch. The same seed gives the same global
    batches for any number of ranks, accumulated micro-batches and workers.

    Args:
        prepared: the stream.
        task: index of the task to train.
        transform: the model's augmenting transform.
        replay_plan: old samples to replay, None = none.
        recall_readers: task -> reader of its old samples; needed for ``storage="copy"``.
        global_batch_size: samples of a batch over all ranks and accumulated micro-batches, at most.
        accumulation: micro-batches that make up a rank's slice of a global batch.
        seed: seed of the run.
        rank: rank of this process.
        world: number of processes.
        workers: processes that read and decode; they stay for the next epoch.
        position: called at every ``iter``: (epoch, micro-batches already done in it).
        max_pixels: larger images are bad samples.
        window: shards whose samples are shuffled together, if any is remote; local ones all are.
        group: batches over which samples are sorted by the bytes of their text, so that samples of
            similar length share a batch; 0 = not sorted. Opens every shard.

    Raises:
        ValueError: if a rank would get no samples, or the replay plan names samples that cannot be
            read.
        RuntimeError: if the replay plan names samples and its ``storage`` is "none".
    """
    recalled = _recalled(prepared, task, replay_plan, recall_readers)
    dataset = TrainDataset(prepared, task, transform, recalled, seed=seed, max_pixels=max_pixels)
    mixture = _mixture(
        dataset, None if replay_plan is None else replay_plan.replay_ratio, global_batch_size
    )
    _expect_samples_for_all(dataset.tasks[task], mixture, accumulation, world)
    plan = _planner(dataset, mixture, window, group)
    batches = ResumableBatchSampler(
        plan, mixture.steps, position, dataset.scored, _ShardPrefetcher(dataset.reader),
        accumulation=accumulation, rank=rank, world=world,
    )  # fmt: skip
    return make_dataloader(dataset, batches, workers, seed=seed)


def _mixture(dataset: TrainDataset, share: float | None, global_batch_size: int) -> Mixture:
    new, old, *others = dataset.counts
    fractions = [fraction for _, fraction in dataset.tasks[dataset.task].mixture]
    return Mixture(new, global_batch_size, old, share, tuple(zip(others, fractions, strict=True)))


def _planner(
    dataset: TrainDataset, mixture: Mixture, window: int, group: int
) -> Callable[..., EpochPlan]:
    if window < 1 or group < 0:
        raise ValueError(
            f"window is {window} and group_by_length {group}: give 1 or more shards, and 0 or more "
            "batches"
        )
    lengths = _lengths(dataset) if group > 1 else None

    def plan(epoch: int) -> EpochPlan:
        order = None
        if dataset.reader.is_remote and mixture.epoch_samples == mixture.new:
            seed = hash_seed(dataset.seed, dataset.task, epoch)
            order = WindowedShuffle(seed, dataset.reader.sizes, window)
        return EpochPlan(
            mixture, seed=dataset.seed, task=dataset.task, epoch=epoch, order=order,
            lengths=lengths, group=group,
        )  # fmt: skip

    return plan


class _ShardPrefetcher:
    """Prefetches remote shards one window before their samples are read."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._requested: set[int] = set()

    def __call__(self, plan: EpochPlan, step: int) -> None:
        """Fetch the shards of the window after the one in which a batch begins."""
        if not isinstance(plan.order, WindowedShuffle):
            return
        ahead = set(plan.order.next_window(plan.mixture.start_of(step)).tolist())
        for number in sorted(ahead - self._requested):
            origin = getattr(self.reader.shards[number], "origin", None)
            if isinstance(origin, CachedFile):
                origin.prefetch()
        self._requested = ahead


def _lengths(dataset: TrainDataset) -> IntArray:
    """Return the bytes of text of every possible entry, in the order of entries."""
    lengths = [_text_lengths(dataset.reader, dataset.tasks[dataset.task])]
    recalled = dataset.recalled
    old = np.zeros(len(recalled.task_ids), dtype=np.int64)
    for task, reader in recalled.readers.items():
        of_task = recalled.task_ids == task
        old[of_task] = _text_lengths(reader, dataset.tasks[task], recalled.sample_ids[of_task])
    lengths.append(old)
    for source, reader in zip(dataset.sources, dataset.source_readers, strict=True):
        lengths.append(_text_lengths(reader, source.task))
    return np.concatenate(lengths).astype(np.int32)


def _text_lengths(reader: SampleReader, task: Task, numbers: IntArray | None = None) -> IntArray:
    return reader.text_bytes(
        "json" if task.task_type == "instruction" else task.text_field.lower(), numbers
    )


def make_dataloader(
    dataset: TrainDataset | Any, batches: Sampler[Any], workers: int, *, seed: int,
    stay: bool = True,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a torch DataLoader whose dataset makes whole batches.

    Args:
        dataset: maps a request to a batch.
        batches: sampler of the requests.
        workers: processes that make batches, 0 = this process.
        seed: seed of torch's own draws in the loader.
        stay: whether the workers stay between passes.
    """
    options: dict[str, Any] = {
        "collate_fn": _identity,
        # A generator of its own: otherwise every iter() draws from torch's global one.
        "generator": generator(seed),
    }
    if workers and workers_are_forked():
        # Without the address space for shared buffers, torch transfers the images itself.
        with contextlib.suppress(OSError):
            return SharedMemoryDataLoader(
                dataset, batches, workers, persistent_workers=stay, **options
            )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=stay and workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _identity(batch: Any) -> Any:
    return batch


def _recalled(
    prepared: OpenStream,
    task: int,
    replay_plan: ReplayPlan | None,
    readers: Mapping[int, SampleReader] | None,
) -> ReplaySamples:
    """Return the replay list with a reader for each of its tasks, all of it checked."""
    if replay_plan is None or len(replay_plan) == 0:
        none = torch.zeros(0, dtype=torch.int64).numpy()
        return ReplaySamples(none, none, {})
    tasks, samples = replay_plan.task_ids.cpu().numpy(), replay_plan.sample_ids.cpu().numpy()
    old = sorted({int(index) for index in tasks})
    if not 0 <= old[0] <= old[-1] < task:
        raise ValueError(
            f"recall names tasks {old} while task {task} is trained: only finished tasks, 0 to "
            f"{task - 1}, can be replayed"
        )
    if replay_plan.storage == "none":
        raise RuntimeError(
            f"recall names samples of the finished tasks {old} but keep is 'none', which releases "
            "old data: use storage='reference' or storage='copy', or a strategy without replay"
        )
    if replay_plan.storage == "copy" and not all(index in (readers or {}) for index in old):
        raise ValueError(
            f"recall keeps copies but there is no reader of them for all of the tasks {old}: pass "
            "recall_readers={task: ReplayCopyReader(folder, task), ...}"
        )
    found: dict[int, SampleReader] = {
        index: readers[index] if readers and index in readers else prepared.reader(index, "train")
        for index in old
    }
    for index, reader in found.items():
        wanted = samples[tasks == index]
        missing = wanted[~reader.contains(wanted)]
        if len(missing):
            raise ValueError(
                f"recall names {len(missing)} samples of task {index} that are not there, "
                f"sample {int(missing[0])} first: the stream, its limit or the kept copies are "
                "not those of the run that chose them"
            )
    return ReplaySamples(tasks, samples, found)


def _expect_samples_for_all(task: Task, mixture: Mixture, accumulation: int, world: int) -> None:
    for name, value in (
        ("global_batch_size", mixture.global_batch_size),
        ("accumulation", accumulation),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if mixture.min_batch < world * accumulation:
        raise ValueError(
            f"global_batch_size {mixture.global_batch_size} gives task '{task.name}' ({task.size} "
            "samples) "
            f"a batch of {mixture.min_batch} samples for {world} devices x {accumulation} "
            "accumulated micro-batches: use fewer devices, less accumulation or a larger "
            "global_batch_size"
        )
