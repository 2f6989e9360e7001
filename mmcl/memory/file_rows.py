"""Rows of a table whose larger columns lie in files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from mmcl.core.batch import Batch
from mmcl.memory.dealing import fill_rows
from mmcl.memory.files import RowFiles
from mmcl.memory.rows import Rows


def fill_file(
    files: RowFiles,
    rows: Rows,
    batches: Iterable[Batch],
    task: int,
    columns: Callable[[Batch], Mapping[str, Tensor]],
    large: Collection[str],
    device: torch.device,
) -> None:
    """Fill a table from one exact pass as ``fill_rows`` does, with some columns in one new file.

    The table gets ``file`` and ``slot`` in their place, which ``RowFiles.take`` wants. A file that
    no row needs is let go. If anything fails, the table is as it was.

    Args:
        files: where they go.
        rows: the table to fill.
        batches: this rank's stride of the data, each sample once.
        task: index of the task.
        columns: makes all columns of a batch, of which the large ones always have the same shape.
        large: names of the columns that go to the file.
        device: where ranks can talk.

    Raises:
        CannotWrite: if they cannot be written.
        ValueError: if some rank had no rows.
    """
    group = 1 + max(files.groups, default=-1)
    before = rows.get_extra_state()
    try:
        with files.spool() as spool:

            def places(batch: Batch) -> dict[str, Tensor]:
                made = columns(batch)
                slots = spool.add(_as_bytes([made[name] for name in made if name in large]))
                plain = {name: column for name, column in made.items() if name not in large}
                return {**plain, "file": torch.full_like(slots, group), "slot": slots}

            fill_rows(rows, batches, task, places, device)
            held = rows.columns
            is_new = held["file"] == group
            files.settle(spool, group, held["slot"][is_new], device)
    except BaseException:
        rows.set_extra_state(before)
        raise
    rows.put("slot", torch.where(is_new, is_new.cumsum(0) - 1, held["slot"]))
    for group in files.groups:
        if not bool((held["file"] == group).any()):
            files.let_go(group)


def _as_bytes(columns: Iterable[Tensor]) -> Tensor:
    """Return (R, bytes of a row) uint8, column behind column."""
    parts = [column.contiguous().flatten(1).view(torch.uint8) for column in columns]
    return torch.cat(parts, 1)
