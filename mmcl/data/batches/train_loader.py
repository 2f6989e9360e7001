"""The training loader: batches whose content is a function of (seed, task, epoch, step)."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import IGNORE_INDEX, Batch, DataSource, GlobalBatch, ReplayPlan, Task, Transform
from mmcl.core.seeding import hash_seed
from mmcl.data.batches.batch_plan import (
    EpochPlan,
    Mixture,
    Permutation,
    WindowedShuffle,
    expect_samples_for_all,
    rank_slice,
)
from mmcl.data.batches.collate import (
    Example,
    PreparedExample,
    collate,
    finish_example,
    mixes_captions_and_classes,
    prepare_ahead,
    prepare_example,
)
from mmcl.data.batches.lanes import LanedShuffle, Lanes, ShardPrefetcher, lanes_of_rank
from mmcl.data.batches.sample_lengths import entry_lengths
from mmcl.data.batches.shared_memory import ImageStack, make_dataloader
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.shards.open_stream import OpenStream
from mmcl.data.shards.reader import SampleReader
from mmcl.data.stored_sample import BadSample, IntArray

MAX_REPLACEMENTS = 100
"""Number of samples tried for one slot, all of them bad, before the run ends."""
WINDOW = 16
"""Number of remote shards whose samples are shuffled together."""

_AS_CAPTIONS = (
    "batches of task '{}' have captions and classes: its classes are learned as captions, their "
    "names in a template, by the contrastive loss (settings of the class loss, label_smoothing and "
    "logit_scope, are not used)"
)


@dataclass(frozen=True)
class BatchRequest:
    """Request for one micro-batch, sent to a worker.

    Attributes:
        epoch: from 0.
        entries: samples of the micro-batch, see ``EpochPlan``.
        loss_weight: see ``Batch.loss_weight``.
        global_batch: see ``Batch.global_batch``.
    """

    epoch: int
    entries: IntArray
    loss_weight: float
    global_batch: GlobalBatch | None = None


@dataclass(frozen=True)
class ReplaySamples:
    """Replay list as arrays (task and number of each sample), with a reader for each task."""

    task_ids: IntArray
    sample_ids: IntArray
    readers: Mapping[int, SampleReader]


class SampleLocation(NamedTuple):
    """Location of the sample of an entry.

    Attributes:
        task: task or source that says what the sample's members mean.
        number: number of the sample in it.
        reader: reader of its samples.
        source: number of the source, 0 = the task or the replay list.
        is_replay: whether it is a replayed sample.
    """

    task: Task
    number: int
    reader: SampleReader
    source: int = 0
    is_replay: bool = False


class TrainDataset(Dataset[Batch]):
    """Dataset of training batches; a bad sample is replaced by a seeded draw of the same kind.

    Args:
        prepared: the stream.
        task: index of the task that is trained.
        transform: the model's transform.
        replayed: the replay list.
        seed: seed of the run.
        max_pixels: largest image that is decoded.

    Attributes:
        counts: number of samples of the task, of the replay list, and of each source.
        as_captions: whether samples with a class get a caption with its name, since others of the
            batches have captions.
    """

    def __init__(
        self,
        prepared: OpenStream,
        task: int,
        transform: Transform,
        replayed: ReplaySamples,
        *,
        seed: int,
        max_pixels: int,
    ) -> None:
        stream = prepared.stream
        old = {int(index) for index in replayed.task_ids}
        self.tasks: dict[int, Task] = {j: stream.tasks[j] for j in {*old, task}}
        self.reader = prepared.reader(task, "train")
        self.task = task
        self.transform = transform
        self.replayed = replayed
        self.seed = seed
        self.max_pixels = max_pixels
        self.sources: list[DataSource] = [
            stream.sources[n - 1] for n, _ in stream.tasks[task].mixture
        ]
        self.source_readers = [prepared.sources[source.number] for source in self.sources]
        self.counts = [len(self.reader), len(replayed.task_ids), *map(len, self.source_readers)]
        self._starts = [sum(self.counts[:kind]) for kind in range(len(self.counts) + 1)]
        self.as_captions = mixes_captions_and_classes(
            [*self.tasks.values(), *(source.task for source in self.sources)]
        )
        self._classes_seen = 1 + max(
            (c for t in stream.tasks[: task + 1] for c in t.class_ids), default=-1
        )

    def composition(self, entries: IntArray) -> tuple[int, int]:
        """Return how many entries are new samples of the task, and how many of sources."""
        return int((entries < self._starts[1]).sum()), int((entries >= self._starts[2]).sum())

    def scored(self, entries: IntArray) -> int:
        """Return how many entries are in the task loss."""
        if all(source.in_loss for source in self.sources):
            return len(entries)
        kinds = np.searchsorted(self._starts[1:-1], entries, side="right")
        in_loss = np.array([True, True, *(source.in_loss for source in self.sources)])
        return int(in_loss[kinds].sum())

    def __getitems__(self, request: BatchRequest) -> Batch:
        """Read, decode and collate one micro-batch."""
        return self.make(request)

    def make(self, request: BatchRequest, room: Tensor | None = None) -> Batch:
        """Read, decode and collate one micro-batch, its images in the buffer ``room``."""
        errors: list[str] = []
        stack = ImageStack(len(request.entries), room)
        examples = [
            self._example(entry, prepared, request.epoch, errors, stack)
            for entry, prepared in prepare_ahead(
                request.entries.tolist(), partial(self._prepare, epoch=request.epoch)
            )
        ]
        batch = collate(examples, errors, request.loss_weight, stack)
        notes = tuple(f"{e.key}: {e.processed.note}" for e in examples if e.processed.note)
        return replace(batch, global_batch=request.global_batch, notes=notes)

    def _example(
        self, first: int, prepared: PreparedExample | BadSample, epoch: int, errors: list[str],
        stack: ImageStack,
    ) -> Example:  # fmt: skip
        """Make the example of an entry, or of the first of its replacements that can be read."""
        entry, own = first, list[str]()
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                own_or_next = self._prepare(entry, epoch) if attempt > 1 else prepared
                example = self._finish(own_or_next, stack)
            except BadSample as bad:
                task, number, reader, source, _ = self._location(entry)
                own.append(f"{reader.describe(number)}: {bad}")
                entry = self._replacement(first, attempt)
            else:
                errors.extend(dict.fromkeys(own))
                return example
        raise ValueError(
            f"{MAX_REPLACEMENTS} samples in a row could not be read in "
            f"{'source' if source else 'task'} '{task.name}', the last is {own[-1]}; "
            "repair its shards"
        )

    def _prepare(self, entry: int, epoch: int) -> PreparedExample:
        """Read the sample of an entry; outside of the loss or of an unseen class: no label."""
        task, number, reader, source, is_replay = self._location(entry)
        own = (self.task,) if is_replay or source else ()
        seed = hash_seed(self.seed, task.index - source, number, epoch, *own)
        prepared = prepare_example(
            reader.read(number), number, task, seed=seed, is_replay=bool(own),
            as_caption=self.as_captions,
        )  # fmt: skip
        if not source:
            return prepared
        in_loss = next(each.in_loss for each in self.sources if each.number == source)
        label = prepared.example.label
        if not in_loss or label >= self._classes_seen:
            label = IGNORE_INDEX
        example = prepared.example._replace(source_id=source, in_loss=in_loss, label=label)
        return prepared._replace(example=example)

    def _finish(self, prepared: PreparedExample | BadSample, stack: ImageStack) -> Example:
        """Decode and transform; outside of the loss no target tokens."""
        if isinstance(prepared, BadSample):
            raise prepared
        example = finish_example(prepared, self.transform, self.max_pixels, stack)
        labels = example.processed.labels
        if example.in_loss or labels is None:
            return example
        labels = torch.full_like(labels, IGNORE_INDEX)
        return example._replace(processed=replace(example.processed, labels=labels))

    def _kind(self, entry: int) -> int:
        """Return 0 for a new sample, 1 for a replayed one, 1 + n for one of the n-th source."""
        return bisect_right(self._starts, entry) - 1

    def reader_of(self, entry: int) -> tuple[SampleReader, int]:
        """Return the reader of the sample of an entry, and its number there."""
        location = self._location(entry)
        return location.reader, location.number

    def _location(self, entry: int) -> SampleLocation:
        kind = self._kind(entry)
        number = entry - self._starts[kind]
        if kind == 0:
            return SampleLocation(self.tasks[self.task], number, self.reader)
        if kind == 1:
            task = int(self.replayed.task_ids[number])
            reader = self.replayed.readers[task]
            sample = int(self.replayed.sample_ids[number])
            return SampleLocation(self.tasks[task], sample, reader, is_replay=True)
        source = self.sources[kind - 2]
        reader = self.source_readers[kind - 2]
        return SampleLocation(source.task, number, reader, source.number)

    def _replacement(self, entry: int, attempt: int) -> int:
        """Return another entry of the same kind, drawn by a seed."""
        kind, first = self._kind(entry), self._location(entry)
        draw = hash_seed(self.seed, first.task.index - first.source, first.number, attempt)
        return self._starts[kind] + draw % self.counts[kind]


class ResumableBatchSampler(Sampler[BatchRequest]):
    """Resumable batch sampler: the requests of an epoch, from the current position of the run.

    Args:
        plan: called with ``epoch=``, returns the plan of its global batches.
        steps: global batches of an epoch.
        position: called at every ``iter``: (epoch, micro-batches already done in it). An epoch that
            is done to its end counts as the start of the next.
        scored: returns how many of the given entries are in the task loss.
        composition: returns how many of the given entries are new, and how many of sources.
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
        composition: Callable[[IntArray], tuple[int, int]] = lambda entries: (len(entries), 0),
        begins: Callable[[EpochPlan, int], None] = lambda plan, step: None,
        *,
        accumulation: int,
        rank: int,
        world: int,
    ) -> None:
        self.plan, self.steps, self.position = plan, steps, position
        self.scored, self.composition, self.begins = scored, composition, begins
        self.accumulation, self.rank, self.world = accumulation, rank, world

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
            batch = plan.batch(step)
            entries = rank_slice(batch, micro_batch, self.accumulation, self.rank, self.world)
            in_loss = self.scored(batch)
            sizes = GlobalBatch(
                len(batch), *self.composition(batch), in_loss, micro_batch, self.accumulation
            )
            weight = self.scored(entries) * slices / in_loss
            yield BatchRequest(epoch, entries, weight, sizes)


def train_loader(
    prepared: OpenStream,
    task: int,
    transform: Transform,
    *,
    replay_plan: ReplayPlan | None, replay_readers: Mapping[int, SampleReader] | None = None,
    global_batch_size: int, accumulation: int = 1, seed: int, rank: int = 0, world: int = 1,
    workers: int = 0, position: Callable[[], tuple[int, int]] = lambda: (0, 0),
    max_pixels: int = MAX_PIXELS, window: int = WINDOW, lanes: int = 1, group: int = 0,
) -> DataLoader[Batch]:  # fmt: skip
    """Build the training loader of a task, with replayed samples and other sources mixed in.

    Its length is the number of micro-batches of an epoch, its ``mixture`` counts samples ahead. The
    same seed gives the same global batches for any number of ranks, micro-batches and workers.

    Args:
        prepared: the stream.
        task: index of the task to train.
        transform: the model's augmenting transform.
        replay_plan: old samples to replay, None = none.
        replay_readers: task -> reader of its old samples, for ``storage="copy"``.
        global_batch_size: samples of a batch over all ranks and accumulated micro-batches, at most.
        accumulation: micro-batches that make up a rank's slice of a global batch.
        seed: seed of the run.
        rank: rank of this process, of ``world``.
        world: number of processes.
        workers: processes that read and decode; they stay for the next epoch.
        position: called at every ``iter``: (epoch, micro-batches already done in it).
        max_pixels: larger images are bad samples.
        window: shards whose samples are shuffled together, if any is remote; local ones all are.
        lanes: parts of remote shards read in parallel; a multiple of ``world``: each by one rank.
        group: batches over which samples are grouped by length; 0 = none. Opens every shard.

    Raises:
        ValueError: if a rank would get no samples, or a sample to replay cannot be read.
        RuntimeError: if the plan names samples and its ``storage`` is "none".
    """
    replayed = _replay_samples(prepared, task, replay_plan, replay_readers)
    dataset = TrainDataset(prepared, task, transform, replayed, seed=seed, max_pixels=max_pixels)
    mixture = _mixture(dataset, global_batch_size, replay_plan)
    expect_samples_for_all(dataset.tasks[task], mixture, accumulation, world)
    plan = _planner(dataset, mixture, window, group, lanes, lanes_of_rank(lanes, rank, world))
    batches = ResumableBatchSampler(
        plan, mixture.steps, position, dataset.scored, dataset.composition,
        ShardPrefetcher(dataset.reader), accumulation=accumulation, rank=rank, world=world,
    )  # fmt: skip
    loader = make_dataloader(dataset, batches, workers, seed=seed)
    loader.mixture = mixture
    return loader


def _mixture(
    dataset: TrainDataset, global_batch_size: int, replay_plan: ReplayPlan | None
) -> Mixture:
    if dataset.as_captions:
        warnings.warn(_AS_CAPTIONS.format(dataset.tasks[dataset.task].name), stacklevel=3)
    new, old, *others = dataset.counts
    shares = (share for _, share in dataset.tasks[dataset.task].mixture)
    ratio = None if replay_plan is None else replay_plan.replay_ratio
    return Mixture(new, global_batch_size, old, ratio, tuple(zip(others, shares, strict=True)))


def _planner(
    dataset: TrainDataset, mixture: Mixture, window: int, group: int, lanes: int, own: range
) -> Callable[..., EpochPlan]:
    if window < 1 or lanes < 1 or group < 0:
        raise ValueError(
            f"window is {window}, lanes {lanes} and group_by_length {group}: give 1 or more shards "
            "and lanes, and 0 or more batches"
        )
    in_windows = dataset.reader.in_windows and mixture.epoch_samples == mixture.new
    divided = Lanes(lanes, mixture.new, mixture.steps) if in_windows and lanes > 1 else None
    numbers = None if divided is None else divided.numbers(own)
    lengths = entry_lengths(dataset, numbers) if group > 1 else None

    def plan(epoch: int) -> EpochPlan:
        order: Permutation | None = None
        seed, sizes = hash_seed(dataset.seed, dataset.task, epoch), dataset.reader.sizes
        if divided is not None:
            order = LanedShuffle(seed, sizes, window, lanes=divided, own=own)
        elif in_windows:
            order = WindowedShuffle(seed, sizes, window)
        return EpochPlan(
            mixture, seed=dataset.seed, task=dataset.task, epoch=epoch, order=order,
            lanes=1 if divided is None else lanes, lengths=lengths, group=group,
        )  # fmt: skip

    return plan


def _replay_samples(
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
            f"replay_plan names tasks {old} while task {task} is trained: only finished tasks, 0 "
            f"to {task - 1}, can be replayed"
        )
    if replay_plan.storage == "none":
        raise RuntimeError(
            f"replay_plan names samples of the finished tasks {old} but its storage is 'none', "
            "which releases old data: use storage='reference' or storage='copy', or a strategy "
            "without replay"
        )
    if replay_plan.storage == "copy" and not all(index in (readers or {}) for index in old):
        raise ValueError(
            f"replay_plan keeps copies but there is no reader of them for all of the tasks {old}: "
            "pass replay_readers={task: ReplayCopyReader(folder, task), ...}"
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
                f"replay_plan names {len(missing)} samples of task {index} that are not there, "
                f"sample {int(missing[0])} first: the stream, its limit or the kept copies are "
                "not those of the run that chose them"
            )
    return ReplaySamples(tasks, samples, found)
