"""Columns of equal length: checked, widened, resized and written over. Used by ``Rows``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch
from torch import Tensor


def expect_columns(
    columns: Mapping[str, Tensor],
    table: Mapping[str, Tensor],
    *,
    rows: int,
    growing: Collection[str],
) -> None:
    """Check that new rows fit a table.

    Args:
        columns: name -> (R, ...) new rows.
        table: name -> rows held; empty before the first.
        rows: R.
        growing: columns whose last dimension may differ.

    Raises:
        ValueError: naming the column that does not fit.
    """
    if table and set(columns) != set(table):
        raise ValueError(
            f"columns are {sorted(columns)} and the table has {sorted(table)}: "
            "use one store for each kind of row"
        )
    for name, column in columns.items():
        if len(column) != rows:
            raise ValueError(
                f"column '{name}' has {len(column)} rows for {rows} visits: give one of each"
            )
        held = table.get(name, column)
        cut = -1 if name in growing else None
        is_alike = held.shape[1:][:cut] == column.shape[1:][:cut] and held.dim() == column.dim()
        if not is_alike or held.dtype != column.dtype:
            raise ValueError(
                f"rows of column '{name}' are {tuple(column.shape[1:])} {column.dtype} and "
                f"the table holds {tuple(held.shape[1:])} {held.dtype}: make them alike, "
                "or name a column that changes width in growing"
            )


def widened(
    table: Mapping[str, Tensor], columns: Mapping[str, Tensor], growing: Mapping[str, int]
) -> dict[str, Tensor]:
    """Return the table on the CPU, as wide as the widest row; empty columns before the first."""
    wide = {}
    for name, column in columns.items():
        held = table.get(name)
        if held is None:
            held = torch.empty((0, *column.shape[1:]), dtype=column.dtype)
        elif name in growing:
            held = padded(held, width_of(column), growing[name])
        wide[name] = held
    return wide


def column_bytes(column: Tensor) -> int:
    """Return the bytes of one row of a column."""
    return prod(column.shape[1:]) * column.element_size()


def width_of(column: Tensor) -> int:
    """Return the size of a row's last dimension, 0 for rows of single numbers."""
    return int(column.shape[-1]) if column.dim() > 1 else 0


def padded(column: Tensor, width: int, fill: int = 0) -> Tensor:
    """Return a column at least ``width`` wide, with ``fill`` behind; single numbers as they are."""
    missing = width - width_of(column)
    if column.dim() < 2 or missing <= 0:
        return column
    return torch.nn.functional.pad(column, (0, missing), value=fill)


def resized(column: Tensor, size: int) -> Tensor:
    """Return a column with memory for ``size`` rows, the first ones as they were."""
    if len(column) == size:
        return column
    other = column.new_zeros((size, *column.shape[1:]))
    count = min(size, len(column))
    other[:count] = column[:count]
    return other


def moved_over(
    values: Tensor, total: int, targets: Tensor, moved: Tensor, fills: Tensor, new: Tensor
) -> Tensor:
    """Return ``total`` values: the old at their places, some moved, new ones written in.

    Args:
        values: (R,) old values.
        total: how many are left.
        targets: places that take the old values standing at ``moved``.
        moved: places of old values beyond ``total``.
        fills: places of the new values.
        new: (places in fills,) new values.
    """
    result = resized(values, total).clone()
    result[targets] = values[moved]
    result[fills] = new
    return result
