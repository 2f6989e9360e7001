"""Rows: a bounded table of equal-length tensors (pictures, features, logits) and where they sit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmcl.core.randomness import ranks_of
from mmcl.memory.selection import lowest
from mmcl.memory.table import (
    column_bytes,
    expect_columns,
    moved_over,
    padded,
    resized,
    widened,
    width_of,
)

_MARK_BYTES = 16


class Rows(nn.Module):
    """A table whose rows are a uniform sample of everything that was ever inserted.

    A row stays while the hash of (seed, group, visit) is among the smallest, so what is held is a
    function of the visits alone, not of their grouping into batches; ranks that insert the same
    rows hold the same table. Column names, dtypes and row shapes are those of the first insert.

    The table stays on the CPU whatever device the module is moved to: pictures of a few thousand
    rows do not belong on a GPU that has a model to train. ``take`` returns CPU tensors.

    Args:
        capacity: rows held at most, 0 = not bounded by rows.
        capacity_bytes: bytes held at most (columns and 16 bytes of marks per row), 0 = not
            bounded by bytes. One of the two must be given; with both, both hold.
        seed: of the choice.
        balanced: share the capacity equally between groups instead of over all visits.
        growing: columns whose last dimension may change between inserts, and what stands behind
            the end of shorter rows; the table has the widest. A plain list of names means zeros.
            A column of single numbers does not grow.

    **Remembers** every column at its own dtype, and 16 bytes per row (hash and group, int64).
    **Asks of the model** nothing; ``bind`` takes its fingerprint.
    """

    def __init__(
        self,
        capacity: int = 0,
        *,
        capacity_bytes: int = 0,
        seed: int = 0,
        balanced: bool = False,
        growing: Sequence[str] | Mapping[str, int] = (),
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
        self.growing = dict(growing) if isinstance(growing, Mapping) else dict.fromkeys(growing, 0)
        self.fingerprint = ""
        self._table: dict[str, Tensor] = {}
        self._ranks = torch.zeros(0, dtype=torch.int64)
        self._groups = torch.zeros(0, dtype=torch.int64)

    def __len__(self) -> int:
        """Return the number of rows held."""
        return len(self._ranks)

    def __bool__(self) -> bool:
        """Return True: an empty table is still a module; ask ``len``."""
        return True

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, marks included; 0 before the first insert."""
        if not self._table:
            return 0
        return _MARK_BYTES + sum(column_bytes(column) for column in self._table.values())

    @property
    def bytes_held(self) -> int:
        """Bytes of all rows held."""
        return len(self) * self.row_bytes

    @property
    def columns(self) -> dict[str, Tensor]:
        """Copies of all columns, each (R, ...), rows in order of their hash."""
        return self.take(torch.arange(len(self)))

    def bind(self, fingerprint: str) -> None:
        """State the encoder that rows are made by and for; rows of another are refused.

        Args:
            fingerprint: of the encoder's frozen weights and preprocessing; "" = not known.

        Raises:
            ValueError: if rows of another encoder are held.
        """
        if len(self):
            _expect_fingerprint(held=self.fingerprint, wanted=fingerprint)
        self.fingerprint = fingerprint

    def accepts(self, visits: Tensor, group: int = 0) -> Tensor:
        """Tell which rows would be held after inserting them, before they are computed.

        Args:
            visits: (R,) int64 visit numbers.
            group: of all of them.

        Returns:
            (R,) bool on the CPU.
        """
        return self._survivors(ranks_of(self.seed, group, visits.cpu()), group)[len(self) :]

    def insert(self, columns: Mapping[str, Tensor], visits: Tensor, group: int = 0) -> None:
        """Offer rows to the table.

        Args:
            columns: name -> (R, ...) tensor, on any device; the same names in every insert.
            visits: (R,) int64 number of each row, unique inside its group.
            group: what the rows belong to (a task) when capacity is shared equally.

        Raises:
            ValueError: if names, row shapes, dtypes or lengths differ from those of the table,
                or if one row alone is larger than ``capacity_bytes``.
        """
        self.insert_ranked(columns, ranks_of(self.seed, group, visits.cpu()), group)

    def insert_ranked(self, columns: Mapping[str, Tensor], ranks: Tensor, group: int = 0) -> None:
        """Offer rows that come with their hashes, from another table of the same seed."""
        columns = {name: column.detach() for name, column in columns.items()}
        if len(ranks) == 0:
            return
        expect_columns(columns, self._table, rows=len(ranks), growing=self.growing)
        self._table = widened(self._table, columns, self.growing)
        if self.capacity_bytes and self.row_bytes > self.capacity_bytes:
            raise ValueError(
                f"one row takes {self.row_bytes} bytes and capacity_bytes is "
                f"{self.capacity_bytes}: give the store at least one row"
            )
        ranks = ranks.cpu()
        stays = self._survivors(ranks, group)
        kept = torch.nonzero(stays[: len(self)]).flatten()
        new = torch.nonzero(stays[len(self) :]).flatten()
        self._place(columns, ranks, group, kept, new)

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw places of the table, each floor(count / R) or one more times.

        Args:
            count: places to draw; up to R of them are all different.
            generator: of the draw.

        Returns:
            (count,) int64, empty from an empty table.
        """
        if not len(self):
            return torch.zeros(0, dtype=torch.int64)
        rounds = -(-count // len(self))
        turns = [torch.randperm(len(self), generator=generator) for _ in range(rounds)]
        return torch.cat([*turns, torch.zeros(0, dtype=torch.int64)])[:count]

    def take(self, places: Tensor) -> dict[str, Tensor]:
        """Return rows by place, 0 = the row of smallest hash, wherever it sits in memory."""
        slots = torch.argsort(self._ranks, stable=True)[places]
        return {name: column[slots] for name, column in self._table.items()}

    def draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return ``count`` rows drawn by ``choose``."""
        return self.take(self.choose(count, generator))

    def put(self, name: str, values: Tensor) -> None:
        """Write over one column of every row.

        Args:
            name: of the column.
            values: (R, ...) in the order of ``columns``.
        """
        slots = torch.argsort(self._ranks, stable=True)
        self._table[name][slots] = values.to(self._table[name].dtype).cpu()

    @property
    def ranks(self) -> Tensor:
        """(R,) int64 hash of every row, in the order of ``columns``."""
        return self._ranks.sort().values

    def empty_copy(self) -> Rows:
        """Return an empty table with the same settings."""
        return Rows(
            self.capacity,
            capacity_bytes=self.capacity_bytes,
            seed=self.seed,
            balanced=self.balanced,
            growing=self.growing,
        )

    def get_extra_state(self) -> dict[str, Any]:
        """Return the table as plain tensors and a string."""
        # Copies: in the middle of a run the next insert writes into the table's own memory.
        return {
            "columns": {name: column[: len(self)].clone() for name, column in self._table.items()},
            "ranks": self._ranks.clone(),
            "groups": self._groups.clone(),
            "fingerprint": self.fingerprint,
        }

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Hold the table of a checkpoint.

        Raises:
            ValueError: if its rows were made by another encoder than the one bound here.
        """
        if len(state["ranks"]) and self.fingerprint:
            _expect_fingerprint(held=state["fingerprint"], wanted=self.fingerprint)
        self.fingerprint = self.fingerprint or state["fingerprint"]
        self._table = {name: column.cpu().clone() for name, column in state["columns"].items()}
        self._ranks, self._groups = state["ranks"].cpu().clone(), state["groups"].cpu().clone()

    def _survivors(self, ranks: Tensor, group: int) -> Tensor:
        """Tell which of (held rows, then new rows) stay: (R + new,) bool."""
        ranks_all = torch.cat([self._ranks, ranks])
        groups = torch.cat([self._groups, torch.full_like(ranks, group)])
        stays = torch.zeros(len(ranks_all), dtype=torch.bool)
        limit = self._limit()
        if limit is None:
            return ~stays
        stays[lowest(ranks_all, limit, groups if self.balanced else None)] = True
        return stays

    def _limit(self) -> int | None:
        """Return the rows that may be held; None while the size of a row is not known."""
        limits = [self.capacity] if self.capacity else []
        if self.capacity_bytes and self._table:
            limits.append(self.capacity_bytes // self.row_bytes)
        return min(limits) if limits else None

    def _place(
        self, columns: Mapping[str, Tensor], ranks: Tensor, group: int, kept: Tensor, new: Tensor
    ) -> None:
        """Write new rows over those that leave, then behind; close gaps if more leave."""
        total = len(kept) + len(new)
        is_free = torch.ones(max(total, len(self)), dtype=torch.bool)
        is_free[kept] = False
        slots = torch.nonzero(is_free).flatten()
        # Fewer rows come than leave only where rows grew under a byte limit: move the last ones.
        moved = kept[kept >= total]
        holes = slots[slots < total]
        targets, fills = holes[: len(moved)], holes[len(moved) :]
        size = self._room(total)
        for name, column in columns.items():
            table = resized(self._table[name], max(size, len(self._table[name])))
            table[targets] = table[moved]
            table = resized(table, size)
            rows = column[new.to(column.device)].cpu()
            if name in self.growing:
                rows = padded(rows, width_of(table), self.growing[name])
            table[fills] = rows
            self._table[name] = table
        self._ranks = moved_over(self._ranks, total, targets, moved, fills, ranks[new])
        groups = torch.full_like(new, group)
        self._groups = moved_over(self._groups, total, targets, moved, fills, groups)

    def _room(self, total: int) -> int:
        """Return the rows to have memory for: doubled as needed, never above the limit."""
        held = max((len(column) for column in self._table.values()), default=0)
        limit = self._limit()
        if total > held:
            held = max(total, 2 * held)
        return held if limit is None else min(held, max(limit, total))


def _expect_fingerprint(*, held: str, wanted: str) -> None:
    if held != wanted:
        raise ValueError(
            f"remembered rows were made by encoder '{held}' and this model is '{wanted}': "
            "load the weights that made them, or start with an empty memory"
        )
