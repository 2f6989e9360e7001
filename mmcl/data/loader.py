"""The training loader: batches whose content is a function of (seed, task, epoch, position)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from mmcl.core import Batch, Recall, Task, Transform
from mmcl.core.randomness import generator, mix
from mmcl.data.decode import MAX_PIXELS
from mmcl.data.order import EpochPlan, Mixture, dealt
from mmcl.data.prepare import PreparedStream
from mmcl.data.reader import Reader, SampleReader
from mmcl.data.remote.cache import CachedOrigin
from mmcl.data.shard import Numbers
from mmcl.data.shuffle import InWindows
from mmcl.data.training import Recalled, Request, TrainingRows
from mmcl.data.transport import SlotLoader, can_share

WINDOW = 16
"""Remote shards whose samples are shuffled together."""


def at_start() -> tuple[int, int]:
    """Return the position of a run that begins: epoch 0, no micro-batch done."""
    return 0, 0


class PlannedBatches(Sampler[Request]):
    """Gives the requests of an epoch, from the position at which the run stands.

    Args:
        plan: called with ``epoch=``, lays out its global batches.
        steps: global batches of an epoch.
        position: asked at every ``iter``: (epoch, micro-batches already done in it). An epoch that
            is done to its end counts as the start of the next.
        scored: tells how many of some entries have a part in the task loss.
        begins: told of a plan and the batch that is asked for next.
        accumulation: micro-batches of a global batch on every rank.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        plan: Callable[..., EpochPlan],
        steps: int,
        position: Callable[[], tuple[int, int]],
        scored: Callable[[Numbers], int] = len,
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
        """Return the micro-batches of a whole epoch."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[Request]:
        epoch, done = self.position()
        epoch, done = epoch + done // len(self), done % len(self)
        plan = self.plan(epoch=epoch)
        parts = self.world * self.accumulation
        for number in range(done, len(self)):
            step, part = divmod(number, self.accumulation)
            self.begins(plan, step)
            whole = plan.batch(step)
            entries = dealt(whole, part, self.accumulation, self.rank, self.world)
            weight = self.scored(entries) * parts / self.scored(whole)
            yield Request(epoch, entries, weight)


def train_loader(
    prepared: PreparedStream,
    task: int,
    transform: Transform,
    *,
    recall: Recall | None,
    recall_readers: Mapping[int, SampleReader] | None = None,
    global_batch: int, accumulation: int = 1, seed: int, rank: int = 0, world: int = 1,
    workers: int = 0, position: Callable[[], tuple[int, int]] = at_start,
    max_pixels: int = MAX_PIXELS, window: int = WINDOW, group: int = 0,
) -> DataLoader[Batch]:  # fmt: skip
    """Build the loader of a task's training part, with old samples and other sources mixed in.

    Its length is the micro-batches of an epoch. The same seed gives the same global batches on
    any number of ranks, parts and workers.

    Args:
        prepared: the stream.
        task: index of the task to learn.
        transform: of the model, augmenting.
        recall: which old samples come in, None = none.
        recall_readers: task -> where its old samples lie; needed for ``keep="copies"``.
        global_batch: rows of a batch over all ranks and accumulated parts, at most.
        accumulation: micro-batches that make up a rank's share of a global batch.
        seed: of the run.
        rank: of this process.
        world: number of processes.
        workers: processes that read and decode; they stay for the next epoch.
        position: asked at every ``iter``: (epoch, micro-batches already done in it).
        max_pixels: larger pictures are bad samples.
        window: shards whose samples are shuffled together, if any is remote; local ones all are.
        group: batches over which rows are sorted by the bytes of their text, which brings rows of
            like length together; 0 = not. Opens every shard.

    Raises:
        ValueError: if a rank would go without rows, or the recall names what cannot be read.
        RuntimeError: if old data is asked for that was given up.
    """
    recalled = _recalled(prepared, task, recall, recall_readers)
    rows = TrainingRows(prepared, task, transform, recalled, seed=seed, max_pixels=max_pixels)
    mixture = _mixture(rows, None if recall is None else recall.share, global_batch)
    _expect_rows(rows.tasks[task], mixture, accumulation, world)
    plan = _planner(rows, mixture, window, group)
    batches = PlannedBatches(
        plan, mixture.steps, position, rows.scored, _Ahead(rows.reader),
        accumulation=accumulation, rank=rank, world=world,
    )  # fmt: skip
    return batch_loader(rows, batches, workers, seed=seed)


def _mixture(rows: TrainingRows, share: float | None, global_batch: int) -> Mixture:
    new, old, *others = rows.counts
    parts = [part for _, part in rows.tasks[rows.task].mix]
    return Mixture(new, global_batch, old, share, tuple(zip(others, parts, strict=True)))


def _planner(
    rows: TrainingRows, mixture: Mixture, window: int, group: int
) -> Callable[..., EpochPlan]:
    if window < 1 or group < 0:
        raise ValueError(
            f"window is {window} and group_lengths {group}: give 1 or more shards, and 0 or more "
            "batches"
        )
    lengths = _lengths(rows) if group > 1 else None

    def plan(epoch: int) -> EpochPlan:
        order = None
        if rows.reader.is_remote and mixture.once == mixture.new:
            order = InWindows(mix(rows.seed, rows.task, epoch), rows.reader.sizes, window)
        own = {"seed": rows.seed, "task": rows.task, "epoch": epoch}
        return EpochPlan(mixture, order=order, lengths=lengths, group=group, **own)

    return plan


class _Ahead:
    """Begins to fetch remote shards a window before their samples are asked for."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._asked: set[int] = set()

    def __call__(self, plan: EpochPlan, step: int) -> None:
        """Fetch what comes behind the window in which a batch begins."""
        if not isinstance(plan.order, InWindows):
            return
        ahead = set(plan.order.ahead(plan.mixture.edge(step)).tolist())
        for number in sorted(ahead - self._asked):
            origin = getattr(self.reader.shards[number], "origin", None)
            if isinstance(origin, CachedOrigin):
                origin.fetch_ahead()
        self._asked = ahead


def _lengths(rows: TrainingRows) -> Numbers:
    """Return the bytes of text of everything that can come, in the order of entries."""
    lengths = [_text_lengths(rows.reader, rows.tasks[rows.task])]
    old = np.zeros(len(rows.recalled.task), dtype=np.int64)
    for task, reader in rows.recalled.readers.items():
        own = rows.recalled.task == task
        old[own] = _text_lengths(reader, rows.tasks[task], rows.recalled.sample[own])
    lengths.append(old)
    for source, reader in zip(rows.sources, rows.source_readers, strict=True):
        lengths.append(_text_lengths(reader, source.rows))
    return np.concatenate(lengths).astype(np.int32)


def _text_lengths(reader: SampleReader, task: Task, numbers: Numbers | None = None) -> Numbers:
    return reader.lengths("json" if task.kind == "answer" else task.text.lower(), numbers)


def batch_loader(
    rows: TrainingRows | Any, batches: Sampler[Any], workers: int, *, seed: int, stay: bool = True
) -> DataLoader[Batch]:
    """Return a torch loader that asks for whole batches; workers may stay between passes."""
    options: dict[str, Any] = {
        "collate_fn": _as_it_is,
        # A generator of its own: otherwise every iter() draws from torch's global one.
        "generator": generator(seed),
    }
    if workers and can_share():
        # Where so much address space is not given, pictures go torch's way.
        with contextlib.suppress(OSError):
            return SlotLoader(rows, batches, workers, persistent_workers=stay, **options)
    return DataLoader(
        rows,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=stay and workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _recalled(
    prepared: PreparedStream,
    task: int,
    recall: Recall | None,
    readers: Mapping[int, SampleReader] | None,
) -> Recalled:
    """Return the recalled list with a reader for each of its tasks, all of it checked."""
    if recall is None or len(recall) == 0:
        none = torch.zeros(0, dtype=torch.int64).numpy()
        return Recalled(none, none, {})
    tasks, samples = recall.task.cpu().numpy(), recall.sample.cpu().numpy()
    old = sorted({int(place) for place in tasks})
    if not 0 <= old[0] <= old[-1] < task:
        raise ValueError(
            f"recall names tasks {old} while task {task} is learned: only finished tasks, 0 to "
            f"{task - 1}, can be recalled"
        )
    if recall.keep == "none":
        raise RuntimeError(
            f"recall asks for samples of the finished tasks {old} but keep is 'none', which gives "
            "old data up: use keep='references' or keep='copies', or a strategy without recall"
        )
    if recall.keep == "copies" and not all(place in (readers or {}) for place in old):
        raise ValueError(
            f"recall keeps copies but there is no reader of them for all of the tasks {old}: pass "
            "recall_readers={task: CopiesReader(folder, task), ...}"
        )
    found: dict[int, SampleReader] = {
        place: readers[place] if readers and place in readers else prepared.reader(place, "train")
        for place in old
    }
    for place, reader in found.items():
        asked = samples[tasks == place]
        missing = asked[~reader.holds(asked)]
        if len(missing):
            raise ValueError(
                f"recall asks for {len(missing)} samples of task {place} that are not there, "
                f"sample {int(missing[0])} first: the stream, its limit or the kept copies are "
                "not those of the run that chose them"
            )
    return Recalled(tasks, samples, found)


def _expect_rows(task: Task, mixture: Mixture, accumulation: int, world: int) -> None:
    for name, value in (("global_batch", mixture.global_batch), ("accumulation", accumulation)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if mixture.smallest < world * accumulation:
        raise ValueError(
            f"global_batch {mixture.global_batch} gives task '{task.name}' ({task.size} samples) "
            f"a batch of {mixture.smallest} rows for {world} devices x {accumulation} accumulated "
            "parts: use fewer devices, less accumulation or a larger global_batch"
        )
