"""How remembered rows are dealt to ranks and gathered from them.

Row i of rank r stands at place i * W + r of a global batch, and of a pass over a task's data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmcl.core.batch import UNSCORED, Batch
from mmcl.core.distributed import gather_rows, rank_and_world, sum_over_ranks
from mmcl.memory.rows import Rows
from mmcl.memory.table import padded, width_of


def global_rows(rows: int, device: torch.device) -> int:
    """Return the sum over ranks of a number of rows; ``device`` is where ranks can talk."""
    if rank_and_world()[1] == 1:
        return rows
    return int(sum_over_ranks(torch.tensor([rows], device=device)))


def own_stride(rows: Tensor) -> Tensor:
    """Return this rank's part of rows that all ranks know."""
    rank, world = rank_and_world()
    return rows[rank::world]


def visit_numbers(is_new: Tensor, seen: int) -> tuple[Tensor, int]:
    """Number the new rows of a global batch as one process would.

    Args:
        is_new: (B,) bool, the rows of this rank to be numbered.
        seen: rows numbered before.

    Returns:
        (own new rows,) int64 numbers on the CPU, from ``seen`` on in global order; and how many
        rows are new on all ranks together.
    """
    rank, _ = rank_and_world()
    flags = is_new.to(torch.int64)
    marks = gather_rows(torch.stack([flags, torch.full_like(flags, rank)], 1)).cpu()
    numbers = seen + marks[:, 0].cumsum(0) - 1
    is_own = (marks[:, 1] == rank) & (marks[:, 0] == 1)
    return numbers[is_own], int(marks[:, 0].sum())


def pass_numbers(batch: Batch, seen: int) -> Tensor:
    """Number the rows of a batch of an exact pass: by sample, else by their place in the pass.

    Args:
        batch: rows of this rank.
        seen: rows of this rank's pass before it.

    Returns:
        (B,) int64 on the CPU, unique inside the task and over ranks.
    """
    if batch.sample is not None:
        return batch.sample.cpu()
    rank, world = rank_and_world()
    return (seen + torch.arange(len(batch))) * world + rank


def read_names(batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Read what every sample of a pass is called, over all ranks; nothing is computed of it.

    Args:
        batches: this rank's stride of the data, each sample once.
        device: where ranks can talk.

    Returns:
        (R, 3) int64 on the CPU, the same on every rank: number, rising; class, -1 = none; bytes
        in its shard, -1 = not known.
    """
    parts = [torch.zeros(0, 3, dtype=torch.int64)]
    seen = 0
    for batch in batches:
        numbers = pass_numbers(batch, seen)
        seen += len(batch)
        parts.append(torch.stack([numbers, classes_of(batch).cpu(), sizes_of(batch).cpu()], 1))
    everyone = gather_rows(torch.cat(parts).to(device)).cpu()
    return everyone[everyone[:, 0].argsort(stable=True)]


def classes_of(batch: Batch) -> Tensor:
    """Return (B,) int64 the class of each row, -1 where it has none."""
    if batch.labels.dim() != 1:
        return batch.labels.new_full((len(batch),), -1)
    return batch.labels.masked_fill(batch.labels == UNSCORED, -1)


def sizes_of(batch: Batch) -> Tensor:
    """Return (B,) int64 the bytes of each row in its shard, -1 where they are not known."""
    return batch.labels.new_full((len(batch),), -1) if batch.bytes is None else batch.bytes


def fill_rows(
    rows: Rows,
    batches: Iterable[Batch],
    task: int,
    columns: Callable[[Batch], Mapping[str, Tensor]],
    device: torch.device,
) -> None:
    """Fill a table from one exact pass, so that all ranks hold the same rows after it.

    Each rank chooses among its own samples, and only what can stay is computed; the choices are
    then gathered, whatever number of batches each rank had.

    Args:
        rows: the table to fill.
        batches: this rank's stride of the data, each sample once.
        task: index of the task, the group of its rows.
        columns: makes the table's columns of a batch, whose ``sample`` is always given.
        device: where ranks can talk (the model's).

    Raises:
        ValueError: if some rank had no rows.
    """
    own = rows.empty_copy()
    seen, last = 0, None
    for batch in batches:
        numbers = pass_numbers(batch, seen)
        seen, last = seen + len(batch), batch
        wanted = torch.nonzero(own.accepts(numbers, task) & rows.accepts(numbers, task)).flatten()
        if len(wanted):
            chosen = batch.take(wanted.to(batch.labels.device))
            named = replace(chosen, sample=numbers[wanted].to(batch.labels.device))
            own.insert(columns(named), numbers[wanted], task)
    held, ranks = own.columns, own.ranks
    if rank_and_world()[1] > 1:
        fewest = int(gather_rows(torch.tensor([seen], device=device)).min())
        if last is None or fewest == 0:
            raise ValueError(
                f"task {task} left a rank without samples: use fewer devices, or give the task "
                "at least one sample for each"
            )
        if not held:
            # This rank gives nothing, but has to say what nothing looks like.
            first = torch.zeros(1, dtype=torch.int64, device=last.labels.device)
            named = replace(last.take(first), sample=first)
            held = {name: row[:0] for name, row in columns(named).items()}
        is_low = ranks <= _largest_wanted(ranks, rows.capacity, device)
        held = {name: column[is_low] for name, column in held.items()}
        held, ranks = _gathered(held, ranks[is_low], rows.growing, device)
    rows.insert_ranked(held, ranks, task)


def _largest_wanted(ranks: Tensor, capacity: int, device: torch.device) -> int:
    """Return the hash above which no row can stay, so that only what may stay travels."""
    everyone = gather_rows(ranks.to(device)).cpu()
    if not 0 < capacity < len(everyone):
        return int(torch.iinfo(torch.int64).max)
    return int(everyone.kthvalue(capacity).values)


def _gathered(
    columns: Mapping[str, Tensor], ranks: Tensor, growing: Mapping[str, int], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows that all ranks chose, one table on the CPU."""
    everyone = {}
    for name in sorted(columns):
        column = columns[name].to(device)
        if name in growing:
            widths = gather_rows(torch.tensor([width_of(column)], device=device))
            column = padded(column, int(widths.max()), growing[name])
        everyone[name] = gather_rows(column).cpu()
    return everyone, gather_rows(ranks.to(device)).cpu()
