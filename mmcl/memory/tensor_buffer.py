"""Tensor buffer: replayed samples as tensors, one column per field, bounded in samples or bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.seeding import hash_priorities
from mmcl.memory.selection import smallest_priorities


def _expect_columns(
    columns: Mapping[str, Tensor], table: Mapping[str, Tensor], rows: int, padded: Collection[str]
) -> None:
    """Check that new rows fit the columns of a buffer, whose table is empty before the first."""
    if table and set(columns) != set(table):
        raise ValueError(
            f"columns are {sorted(columns)} and the table has {sorted(table)}: "
            "use one buffer for each kind of row"
        )
    for name, column in columns.items():
        if len(column) != rows:
            raise ValueError(
                f"column '{name}' has {len(column)} rows for {rows} sample_ids: give one of each"
            )
        held = table.get(name, column)
        cut = -1 if name in padded else None
        is_alike = held.shape[1:][:cut] == column.shape[1:][:cut] and held.dim() == column.dim()
        if not is_alike or held.dtype != column.dtype:
            raise ValueError(
                f"rows of column '{name}' are {tuple(column.shape[1:])} {column.dtype} and "
                f"the table holds {tuple(held.shape[1:])} {held.dtype}: make them equal, "
                "or name a column whose last dimension changes in padded_columns"
            )


def _widened(
    table: Mapping[str, Tensor], columns: Mapping[str, Tensor], padded_columns: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the columns padded to the largest row, on the CPU; empty before the first row."""
    result = {}
    for name, column in columns.items():
        held = table.get(name)
        if held is None:
            held = torch.empty((0, *column.shape[1:]), dtype=column.dtype)
        elif name in padded_columns:
            held = padded(held, last_dim(column), padded_columns[name])
        result[name] = held
    return result


def last_dim(column: Tensor) -> int:
    """Return the last dimension of a column's rows, 0 for rows of single numbers."""
    return int(column.shape[-1]) if column.dim() > 1 else 0


def padded(column: Tensor, dim: int, fill: int = 0) -> Tensor:
    """Return a column padded to ``dim`` numbers a row with ``fill``; single numbers as they are."""
    missing = dim - last_dim(column)
    if column.dim() < 2 or missing <= 0:
        return column
    return torch.nn.functional.pad(column, (0, missing), value=fill)


def _resized(column: Tensor, size: int) -> Tensor:
    """Return a column resized to ``size`` rows, the first ones unchanged; itself if it has them."""
    if len(column) == size:
        return column
    other = column.new_zeros((size, *column.shape[1:]))
    count = min(size, len(column))
    other[:count] = column[:count]
    return other


_HASH_AND_GROUP_BYTES = 16


class TensorBuffer(nn.Module):
    """Reservoir buffer of tensors: a uniform sample of all rows that were ever inserted.

    A row is kept while the hash of (seed, group, sample id) is among the smallest, so the content
    is a function of the ids alone, not of their grouping into batches; processes that insert the
    same rows hold the same buffer. Names, dtypes and row shapes are those of the first insert.

    The buffer stays on the CPU whatever device the module is moved to: images of a few thousand
    rows do not belong on the GPU of the model. ``get`` returns CPU tensors.

    Args:
        capacity: rows held at most, 0 = not bounded by rows.
        capacity_bytes: bytes held at most (columns and 16 bytes of hash and group per row), 0 =
            not bounded by bytes. One of the two must be given; with both, both hold.
        seed: seed of the selection.
        balanced: divide the capacity equally between groups instead of over all samples.
        padded_columns: columns whose last dimension may change between inserts, and the padding
            value of shorter rows; the buffer has the largest. A plain list of names means zeros. A
            column of single numbers does not grow.

    **Remembers** every column at its own dtype, and 16 bytes per row (hash and group, int64).
    **Asks of the model** nothing; ``bind_encoder`` takes its fingerprint.
    """

    def __init__(
        self,
        capacity: int = 0,
        *,
        capacity_bytes: int = 0,
        seed: int = 0,
        balanced: bool = False,
        padded_columns: Sequence[str] | Mapping[str, int] = (),
    ) -> None:
        super().__init__()
        if capacity < 0 or capacity_bytes < 0 or capacity + capacity_bytes == 0:
            raise ValueError(
                f"capacity is {capacity} rows and capacity_bytes is {capacity_bytes}: "
                "give at least one of them, above 0"
            )
        self.capacity = capacity
        self.capacity_bytes = capacity_bytes
        self.seed = seed
        self.balanced = balanced
        if not isinstance(padded_columns, Mapping):
            padded_columns = dict.fromkeys(padded_columns, 0)
        self.padded_columns = dict(padded_columns)
        self.fingerprint = ""
        self._table: dict[str, Tensor] = {}
        self._priorities = torch.zeros(0, dtype=torch.int64)
        self._groups = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of rows held."""
        return len(self._priorities)

    def __bool__(self) -> bool:
        """Return True: an empty buffer is still a module; use ``len``."""
        return True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, hash and group included; 0 before the first insert."""
        if not self._table:
            return 0
        sizes = [prod(c.shape[1:]) * c.element_size() for c in self._table.values()]
        return _HASH_AND_GROUP_BYTES + sum(sizes)

    @property
    def columns(self) -> dict[str, Tensor]:
        """Copies of all columns, each (R, ...), rows in order of their hash."""
        return self.get(torch.arange(len(self)))

    def bind_encoder(self, fingerprint: str) -> None:
        """Bind the buffer to the encoder of its rows, by its fingerprint; "" = unknown.

        Raises:
            ValueError: if rows of another encoder are held.
        """
        if len(self):
            _expect_fingerprint(held=self.fingerprint, wanted=fingerprint)
        self.fingerprint = fingerprint

    def would_keep(self, sample_ids: Tensor, group: int = 0) -> Tensor:
        """Return which rows would be kept after inserting them, before they are computed.

        (R,) bool on the CPU, for (R,) int64 ids that are unique inside the group.
        """
        own = hash_priorities(self.seed, group, sample_ids.cpu())
        return self._survivors(own, group)[len(self) :]

    def add(self, columns: Mapping[str, Tensor], sample_ids: Tensor, group: int = 0) -> None:
        """Offer rows to the buffer.

        Args:
            columns: name -> (R, ...) tensor, on any device; the same names in every insert.
            sample_ids: (R,) int64 id of each row, unique inside its group.
            group: of the rows (a task), for a capacity that is divided equally.

        Raises:
            ValueError: if names, row shapes, dtypes or lengths differ from those of the
                buffer, or if one row alone is larger than ``capacity_bytes``.
        """
        hashes = hash_priorities(self.seed, group, sample_ids.cpu())
        self.insert_with_priority(columns, hashes, group)

    def insert_with_priority(
        self, columns: Mapping[str, Tensor], priorities: Tensor, group: int = 0
    ) -> None:
        """Offer rows that come with their hashes, from another buffer of the same seed."""
        columns = {name: column.detach() for name, column in columns.items()}
        if len(priorities) == 0:
            return
        _expect_columns(columns, self._table, len(priorities), self.padded_columns)
        self._table = _widened(self._table, columns, self.padded_columns)
        if self.capacity_bytes and self.row_bytes > self.capacity_bytes:
            raise ValueError(
                f"one row takes {self.row_bytes} bytes and capacity_bytes is "
                f"{self.capacity_bytes}: give the buffer at least one row"
            )
        priorities = priorities.cpu()
        stays = self._survivors(priorities, group)
        kept = torch.nonzero(stays[: len(self)]).flatten()
        new = torch.nonzero(stays[len(self) :]).flatten()
        self._write(columns, priorities, group, kept, new)

    def sample_indices(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw (count,) int64 indices of rows, each floor(count / R) or one more times.

        Up to R indices are all different; from an empty buffer there are none.
        """
        if not len(self):
            return torch.zeros(0, dtype=torch.int64)
        rounds = -(-count // len(self))
        drawn = [torch.randperm(len(self), generator=generator) for _ in range(rounds)]
        return torch.cat([*drawn, torch.zeros(0, dtype=torch.int64)])[:count]

    def get(self, indices: Tensor) -> dict[str, Tensor]:
        """Return rows by index, 0 = the row of smallest hash, wherever it is in memory."""
        index = torch.argsort(self._priorities, stable=True)[indices]
        return {name: column[index] for name, column in self._table.items()}

    def set_column(self, name: str, values: Tensor) -> None:
        """Overwrite one column of all rows by values (R, ...) in the order of ``columns``."""
        index = torch.argsort(self._priorities, stable=True)
        self._table[name][index] = values.to(self._table[name].dtype).cpu()

    @property
    def priorities(self) -> Tensor:
        """Hash of every row, (R,) int64, in the order of ``columns``."""
        return self._priorities.sort().values

    def empty_copy(self) -> TensorBuffer:
        """Return an empty buffer with the same settings."""
        return TensorBuffer(
            self.capacity,
            capacity_bytes=self.capacity_bytes,
            seed=self.seed,
            balanced=self.balanced,
            padded_columns=self.padded_columns,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the buffer as plain tensors and a string."""
        # Copies, because the next insert writes into the buffer's own memory.
        return {
            "columns": {name: column[: len(self)].clone() for name, column in self._table.items()},
            "priorities": self._priorities.clone(),
            "groups": self._groups.clone(),
            "fingerprint": self.fingerprint,
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Load the buffer of a checkpoint.

        Raises:
            ValueError: if its rows are of another encoder than the one bound here.
        """
        if len(state["priorities"]) and self.fingerprint:
            _expect_fingerprint(held=state["fingerprint"], wanted=self.fingerprint)
        self.fingerprint = self.fingerprint or state["fingerprint"]
        self._table = {name: column.cpu().clone() for name, column in state["columns"].items()}
        self._priorities = state["priorities"].cpu().clone()
        self._groups = state["groups"].cpu().clone()

    def _survivors(self, priorities: Tensor, group: int) -> Tensor:
        """Return which of (held rows, then new rows) are kept: (R + new,) bool."""
        everyone = torch.cat([self._priorities, priorities])
        groups = torch.cat([self._groups, torch.full_like(priorities, group)])
        stays = torch.zeros(len(everyone), dtype=torch.bool)
        limit = self._limit()
        if limit is None:
            return ~stays
        stays[smallest_priorities(everyone, limit, groups if self.balanced else None)] = True
        return stays

    def _limit(self) -> int | None:
        """Return the number of rows that may be held; None while the size of a row is unknown."""
        limits = [self.capacity] if self.capacity else []
        if self.capacity_bytes and self._table:
            limits.append(self.capacity_bytes // self.row_bytes)
        return min(limits) if limits else None

    def _write(
        self,
        columns: Mapping[str, Tensor],
        priorities: Tensor,
        group: int,
        kept: Tensor,
        new: Tensor,
    ) -> None:
        """Write new rows over evicted ones, then append; close gaps if more are evicted."""
        total = len(kept) + len(new)
        is_free = torch.ones(max(total, len(self)), dtype=torch.bool)
        is_free[kept] = False
        free = torch.nonzero(is_free).flatten()
        # More rows are evicted than added only where rows grew under a byte limit: move the last.
        moved = kept[kept >= total]
        holes = free[free < total]
        targets, fills = holes[: len(moved)], holes[len(moved) :]
        size = self._allocated(total)
        for name, column in columns.items():
            table = _resized(self._table[name], max(size, len(self._table[name])))
            table[targets] = table[moved]
            table = _resized(table, size)
            rows = column[new.to(column.device)].cpu()
            if name in self.padded_columns:
                rows = padded(rows, last_dim(table), self.padded_columns[name])
            table[fills] = rows
            self._table[name] = table
        hashes, groups = _resized(self._priorities, total), _resized(self._groups, total)
        hashes[targets], groups[targets] = self._priorities[moved], self._groups[moved]
        hashes[fills], groups[fills] = priorities[new], group
        self._priorities, self._groups = hashes, groups

    def _allocated(self, total: int) -> int:
        """Return the number of rows to allocate: doubled as needed, never above the limit."""
        held = max((len(column) for column in self._table.values()), default=0)
        limit = self._limit()
        if total > held:
            held = max(total, 2 * held)
        return held if limit is None else min(held, max(limit, total))


def _expect_fingerprint(*, held: str, wanted: str) -> None:
    if held != wanted:
        raise ValueError(
            f"stored rows were made by encoder '{held}' and this model is '{wanted}': "
            "load the weights that made them, or start with an empty buffer"
        )
