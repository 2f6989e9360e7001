"""Batch: what one step sees."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mmcl.core.sample import Reference

UNSCORED = -100
"""Label of a row (or token) that the task loss leaves out, as in torch's cross entropy."""

_ROW_FIELDS = (
    "labels", "task", "tokens", "mask", "features", "sample", "recalled", "source", "scored",
    "bytes",
)  # fmt: skip

_SMALL_BYTES = 1 << 16
_BY_VALUE = (torch.int64, torch.bool, torch.uint8, torch.float32)


@dataclass(frozen=True)
class Batch:
    """Rows of one step. B rows, M pictures, L tokens, N image tokens, D width.

    Attributes:
        images: (M, 3, H, W) uint8 as decoded and resized; the model normalises on its device.
        labels: (B,) int64 class index (column of the class scores), -100 = not scored; for rows
            that are answered (B, L), the tokens that are scored and -100 elsewhere.
        task: (B,) int64, the task each row came from.
        owner: (M,) int64, the row each picture belongs to; None = one each, in order.
        tokens: (B, L) int64, padded; None when rows have no text of their own.
        mask: (B, L) bool, True on real tokens.
        features: (B, N, D) frozen-encoder output that stands in for images.
        sample: (B,) int64, the number of each row inside its task; (task, sample) names it.
        recalled: (B,) bool, True where the row is not of the task that is learned: remembered, or
            of another source; None = all rows are new.
        source: (B,) int64, 0 for rows of the task and of memory, n for rows of the stream's n-th
            source (their ``task`` is -1); None = all 0.
        scored: (B,) bool, False where a source's row has no part in the task loss; None = all have.
        bytes: (B,) int64, what the row's sample takes in its shard; None = not known.
        keys: sample keys, to trace a row back to its shard.
        references: of rows that are answered: the question, and what counts as right.
        faults: what could not be read while this batch was made, one sentence each.
        weight: factor of the loss that makes the mean over ranks and accumulated parts the mean
            over the global batch: own rows * ranks * parts / rows of the global batch.
    """

    images: Tensor | None
    labels: Tensor
    task: Tensor
    owner: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    features: Tensor | None = None
    sample: Tensor | None = None
    recalled: Tensor | None = None
    source: Tensor | None = None
    scored: Tensor | None = None
    bytes: Tensor | None = None
    keys: tuple[str, ...] = ()
    references: tuple[Reference, ...] = ()
    faults: tuple[str, ...] = ()
    weight: float = 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle small tensors by value: a loader's worker sends every other one as a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        small = {name: value.numpy() for name, value in values.items() if _is_small(value)}
        return _received, ({n: v for n, v in values.items() if n not in small}, small)

    def __len__(self) -> int:
        """Return B, the number of rows."""
        return int(self.labels.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with every tensor on ``device``."""
        if self.labels.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from where a GPU copies faster."""
        return self._map(lambda tensor: tensor.pin_memory())

    def take(self, rows: Tensor) -> Batch:
        """Return the chosen rows, in the order asked.

        Args:
            rows: (R,) int64 row numbers, 0 to B-1; a number may appear twice.
        """
        taken: dict[str, Any] = {name: value[rows] for name, value in self._row_tensors().items()}
        if self.images is not None:
            if self.owner is None:
                taken["images"] = self.images[rows]
            else:
                taken["images"], taken["owner"] = _take_owned(self.images, self.owner, rows)
        places = rows.tolist()
        taken["keys"] = tuple(self.keys[row] for row in places) if self.keys else ()
        known = self.references
        taken["references"] = tuple(known[row] for row in places) if known else ()
        return replace(self, **taken)

    def join(self, other: Batch) -> Batch:
        """Return the rows of both, this batch first.

        Texts are padded to the longer of the two. A field that one side lacks must be lacking in
        the other, except ``recalled`` (None counts as all new), ``sample`` (None as -1),
        ``source`` (as 0), ``scored`` (as all) and ``bytes`` (as -1).

        Raises:
            ValueError: if one side has pictures, tokens or features that the other has not.
        """
        joined: dict[str, Any] = {}
        left, right = _with_marks(self, other), _with_marks(other, self)
        left, right = _padded(left, right), _padded(right, left)
        for name in _ROW_FIELDS:
            joined[name] = _joined(name, getattr(left, name), getattr(right, name))
        joined["images"] = _joined("images", left.images, right.images)
        if left.owner is not None or right.owner is not None:
            joined["owner"] = torch.cat([_owners(left), _owners(right) + len(left)])
        for name in ("keys", "references"):
            ours, theirs = getattr(left, name), getattr(right, name)
            is_whole = len(ours) == len(left) and len(theirs) == len(right)
            joined[name] = ours + theirs if is_whole else ()
        return replace(self, faults=self.faults + other.faults, **joined)

    @property
    def is_answered(self) -> bool:
        """Whether the rows' labels are tokens to be said, not classes."""
        return self.labels.dim() == 2

    def _map(self, change: Any) -> Batch:
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        changed = {name: change(v) for name, v in values if isinstance(v, Tensor)}
        return replace(self, **changed)

    def _row_tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in _ROW_FIELDS}
        return {name: value for name, value in values.items() if value is not None}


def _is_small(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_cpu
        and value.dtype in _BY_VALUE
        and value.nbytes <= _SMALL_BYTES
        and not value.requires_grad
    )


def _received(values: dict[str, Any], small: dict[str, Any]) -> Batch:
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in small.items()}
    return Batch(**values, **tensors)


def _owners(batch: Batch) -> Tensor:
    return (
        torch.arange(len(batch), device=batch.labels.device)
        if batch.owner is None
        else (batch.owner)
    )


def _take_owned(images: Tensor, owner: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    pictures = [torch.nonzero(owner == row).flatten() for row in rows]
    new_owner = [torch.full_like(found, place) for place, found in enumerate(pictures)]
    return images[torch.cat(pictures)], torch.cat(new_owner)


def _with_marks(batch: Batch, other: Batch) -> Batch:
    """Fill in the marks that this batch lacks, and those that the other has."""
    labels, rows = batch.labels, len(batch)
    marks: dict[str, Any] = {
        "recalled": labels.new_zeros(rows, dtype=torch.bool),
        "sample": labels.new_full((rows,), -1),
    }
    absent = {
        "source": labels.new_zeros(rows),
        "scored": labels.new_ones(rows, dtype=torch.bool),
        "bytes": labels.new_full((rows,), -1),
    }
    marks |= {name: mark for name, mark in absent.items() if getattr(other, name) is not None}
    if batch.tokens is not None:
        marks["mask"] = torch.ones_like(batch.tokens, dtype=torch.bool)
    lacking = {name: mark for name, mark in marks.items() if getattr(batch, name) is None}
    return replace(batch, **lacking)


def _padded(batch: Batch, other: Batch) -> Batch:
    if batch.tokens is None or other.tokens is None or batch.mask is None:
        return batch
    missing = other.tokens.shape[1] - batch.tokens.shape[1]
    if missing <= 0:
        return batch
    pad = torch.nn.functional.pad
    labels = batch.labels
    if batch.is_answered:
        labels = pad(labels, (0, missing), value=UNSCORED)
    tokens, mask = pad(batch.tokens, (0, missing)), pad(batch.mask, (0, missing))
    return replace(batch, tokens=tokens, mask=mask, labels=labels)


def _joined(name: str, left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None and right is None:
        return None
    if left is None or right is None:
        raise ValueError(
            f"one batch has {name} and the other has not: join batches of the same kind "
            f"(encode pictures first if the remembered rows are features)"
        )
    return torch.cat([left, right.to(left.device)])
