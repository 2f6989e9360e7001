"""Distributed filling of buffers: samples numbered, scattered to ranks and gathered from them.

Sample i of rank r has index i * W + r in a global batch, and in a pass over a task's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmcl.core.batch import IGNORE_INDEX, Batch
from mmcl.core.distributed import all_gather_samples, all_reduce_sum, rank_and_world
from mmcl.memory.tensor_buffer import TensorBuffer, last_dim, padded


def global_count(count: int, device: torch.device) -> int:
    """Return the sum over ranks of a number of samples; ``device`` is for communication."""
    if rank_and_world()[1] == 1:
        return count
    return int(all_reduce_sum(torch.tensor([count], device=device)))


def rank_stride(values: Tensor, micro_batch: int = 0, micro_batches: int = 1) -> Tensor:
    """Return this rank's stride of a tensor that all ranks have, in one of its micro-batches."""
    rank, world = rank_and_world()
    return values[micro_batch * world + rank :: world * micro_batches]


def global_sample_ids(is_new: Tensor, seen: int) -> tuple[Tensor, int]:
    """Number the new samples of a global batch as one process would.

    Args:
        is_new: (B,) bool, the samples of this rank to be numbered.
        seen: samples numbered before.

    Returns:
        (own new samples,) int64 numbers on the CPU, from ``seen`` on in global order; and the
        number of new samples on all ranks together.
    """
    rank, _ = rank_and_world()
    flags = is_new.to(torch.int64)
    marks = all_gather_samples(torch.stack([flags, torch.full_like(flags, rank)], 1)).cpu()
    numbers = seen + marks[:, 0].cumsum(0) - 1
    is_own = (marks[:, 1] == rank) & (marks[:, 0] == 1)
    return numbers[is_own], int(marks[:, 0].sum())


def pass_sample_ids(batch: Batch, seen: int) -> Tensor:
    """Return the sample ids of a batch of an exact pass, else positions in the pass.

    (B,) int64 on the CPU, unique inside the task and over ranks; ``seen`` counts this rank's
    samples before the batch. Ids of -1 are unknown.
    """
    if batch.sample_ids is not None and bool((batch.sample_ids >= 0).all()):
        return batch.sample_ids.cpu()
    rank, world = rank_and_world()
    return (seen + torch.arange(len(batch))) * world + rank


def collect_metadata(batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Collect sample id, class and bytes of every sample of a pass, over all ranks.

    Args:
        batches: this rank's stride of the data, each sample once.
        device: for communication between ranks.

    Returns:
        (R, 3) int64 on the CPU, the same on every rank: sample id, rising; class, -1 = none; bytes
        in its shard, -1 = unknown.
    """
    collected = [torch.zeros(0, 3, dtype=torch.int64)]
    seen = 0
    for batch in batches:
        columns = (pass_sample_ids(batch, seen), class_ids(batch), sample_bytes(batch))
        seen += len(batch)
        collected.append(torch.stack([column.cpu() for column in columns], 1))
    everyone = all_gather_samples(torch.cat(collected).to(device)).cpu()
    return everyone[everyone[:, 0].argsort(stable=True)]


def class_ids(batch: Batch) -> Tensor:
    """Return (B,) int64 the class of each sample, -1 where it has none."""
    if batch.labels.dim() != 1:
        return batch.labels.new_full((len(batch),), -1)
    return batch.labels.masked_fill(batch.labels == IGNORE_INDEX, -1)


def sample_bytes(batch: Batch) -> Tensor:
    """Return (B,) int64 the bytes of each sample in its shard, -1 where unknown."""
    return batch.labels.new_full((len(batch),), -1) if batch.num_bytes is None else batch.num_bytes


TOKEN_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE_INDEX}
"""Columns of ``batch_columns`` that grow with the longest text, and their padding."""


def batch_columns(batch: Batch, *fields: str) -> dict[str, Tensor]:
    """Return labels, task ids, the named fields and the tokens with their mask as columns.

    Captions have the ids of their images as well, also where a batch does not state them.
    """
    names = ("labels", "task_ids", *fields, "input_ids", "attention_mask")
    columns = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    if "input_ids" in columns and "attention_mask" not in columns:
        columns["attention_mask"] = torch.ones_like(columns["input_ids"], dtype=torch.bool)
    if "input_ids" in columns and not batch.is_generative:
        known = batch.image_ids
        columns["image_ids"] = torch.full_like(batch.labels, -1) if known is None else known
    return columns


def replayed_batch(columns: Mapping[str, Tensor], like: Batch | None = None) -> Batch:
    """Return the inverse of ``batch_columns``, marked as replayed; with keys if ``like`` has."""
    count = len(columns["labels"])
    return Batch(
        labels=columns["labels"],
        task_ids=columns["task_ids"],
        images=columns.get("images"),
        features=columns.get("features"),
        input_ids=columns.get("input_ids"),
        attention_mask=columns.get("attention_mask"),
        image_ids=columns.get("image_ids"),
        is_replay=torch.ones(count, dtype=torch.bool),
        keys=("",) * count if like is not None and like.keys else (),
    )


def fill_buffer(
    buffer: TensorBuffer,
    batches: Iterable[Batch],
    task: int,
    columns: Callable[[Batch], Mapping[str, Tensor]],
    device: torch.device,
) -> None:
    """Fill a buffer from one exact pass; afterwards all ranks hold the same samples.

    Each rank selects among its own samples, and only what may be kept is computed; the selections
    are then gathered. Ranks may have different numbers of batches.

    Args:
        buffer: changed in place.
        batches: this rank's stride of the data, each sample once.
        task: index of the task, the group of its samples.
        columns: returns the buffer's columns of a batch, whose ``sample_ids`` are always given.
        device: for communication between ranks (the model's).

    Raises:
        ValueError: if some rank had no samples.
    """
    own, seen, last = buffer.empty_copy(), 0, None
    for batch in batches:
        numbers = pass_sample_ids(batch, seen)
        seen, last = seen + len(batch), batch
        is_wanted = own.would_keep(numbers, task) & buffer.would_keep(numbers, task)
        wanted = torch.nonzero(is_wanted).flatten()
        if len(wanted):
            chosen = batch.take(wanted.to(batch.labels.device))
            named = replace(chosen, sample_ids=numbers[wanted].to(batch.labels.device))
            own.add(columns(named), numbers[wanted], task)
    held, priorities = own.columns, own.priorities
    if rank_and_world()[1] > 1:
        fewest = int(all_gather_samples(torch.tensor([seen], device=device)).min())
        if last is None or fewest == 0:
            raise ValueError(
                f"task {task} left a rank without samples: use fewer devices, or give the task "
                "at least one sample for each"
            )
        if not held:
            # This rank sends nothing, but the gather needs its columns' shapes and dtypes.
            first = torch.zeros(1, dtype=torch.int64, device=last.labels.device)
            named = replace(last.take(first), sample_ids=first)
            held = {name: column[:0] for name, column in columns(named).items()}
        is_low = priorities <= _largest_wanted(priorities, buffer.capacity, device)
        held = {name: column[is_low] for name, column in held.items()}
        held = _gathered(held, buffer.padded_columns, device)
        priorities = all_gather_samples(priorities[is_low].to(device)).cpu()
    buffer.insert_with_priority(held, priorities, task)


def with_samples_of_all_ranks(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches with the samples of all ranks in place of this rank's own.

    Labels, ids, images or features, and texts are sent; every rank gets all of them.

    Args:
        batches: this rank's; ranks may have different numbers of them, but all have one, which may
            be without samples.
        device: for communication between ranks.

    Raises:
        ValueError: if samples share or lack images, or some rank has no batch.
    """
    if rank_and_world()[1] == 1:
        yield from batches
        return
    last: Batch | None = None
    waiting = iter(batches)
    while True:
        batch = next(waiting, None)
        is_first, last = last is None, last if batch is None else batch
        ranks = all_gather_samples(torch.tensor([batch is not None], device=device))
        if not ranks.any():
            return
        if last is None or (is_first and not ranks.all()):
            raise ValueError(
                "captions are compared over all ranks and some rank has none: use fewer devices, "
                "or give the task at least one sample for each"
            )
        if last.image_owner is not None:
            raise ValueError(
                "samples that share or lack images cannot be compared over ranks: use one device"
            )
        own = last if batch is not None else last.take(last.task_ids.new_zeros(0))
        columns = batch_columns(own, "images", "features", "sample_ids")
        everyone = _gathered(columns, TOKEN_PADDING, device)
        ids = everyone["sample_ids"]
        yield replace(replayed_batch(everyone), is_replay=None, sample_ids=ids).to(device)


def gather_buffer(buffer: TensorBuffer, device: torch.device) -> dict[str, Tensor]:
    """Return the rows of smallest hash of all ranks' buffers on a device; no rank has none."""
    order = all_gather_samples(buffer.priorities.to(device)).argsort(stable=True)
    return {
        name: all_gather_samples(column.to(device))[order[: buffer.capacity]]
        for name, column in buffer.columns.items()
    }


def _largest_wanted(priorities: Tensor, capacity: int, device: torch.device) -> int:
    """Return the largest priority that may be kept, so that only those samples are sent."""
    everyone = all_gather_samples(priorities.to(device)).cpu()
    if not 0 < capacity < len(everyone):
        return int(torch.iinfo(torch.int64).max)
    return int(everyone.kthvalue(capacity).values)


def _gathered(
    columns: Mapping[str, Tensor], padded_columns: Mapping[str, int], device: torch.device
) -> dict[str, Tensor]:
    """Return the samples selected on all ranks, on the CPU."""
    everyone = {}
    for name in sorted(columns):
        column = columns[name].to(device)
        if name in padded_columns:
            dims = all_gather_samples(torch.tensor([last_dim(column)], device=device))
            column = padded(column, int(dims.max()), padded_columns[name])
        everyone[name] = all_gather_samples(column).cpu()
    return everyone
