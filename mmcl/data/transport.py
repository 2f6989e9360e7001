"""How pictures come from a loader's workers: through memory that is used again and again.

torch sends every tensor of a worker as a new file in shared memory. Its pages are new to both
processes, and bringing them in costs more than decoding does. Here a worker stacks pictures into a
slot, the main process copies them out, and the slot's pages stay where they are. The memory is
anonymous: a killed run leaves nothing behind.
"""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import Batch

AHEAD = 2
"""Batches that each worker makes ahead; torch's own default."""

_SLOT_BYTES = 1 << 28
"""Of address space, not of memory; larger batches go torch's way."""


class Maker(Protocol):
    """What makes batches in a worker."""

    def make(self, request: Any, room: Tensor | None = None) -> Any:
        """Return a Batch, or what has one as ``batch``; its pictures in ``room`` if they fit.

        Args:
            request: of the batch sampler.
            room: (bytes,) uint8 to lay pictures into.
        """
        ...


@dataclass(frozen=True)
class Placed:
    """What a worker made, its pictures left in a slot.

    Attributes:
        found: without pictures.
        slot: that holds them.
        shape: of the pictures, uint8.
    """

    found: Any
    slot: int
    shape: tuple[int, ...]


class Slots:
    """Memory that forked workers share with the process that made it.

    Args:
        count: of slots.
    """

    def __init__(self, count: int) -> None:
        self._maps = [mmap.mmap(-1, _SLOT_BYTES) for _ in range(count)]
        self._rooms = [torch.frombuffer(one, dtype=torch.uint8) for one in self._maps]

    def __len__(self) -> int:
        """Return the number of slots."""
        return len(self._rooms)

    def room(self, slot: int) -> Tensor:
        """Return (bytes,) uint8, the whole of a slot."""
        return self._rooms[slot]

    def taken(self, placed: Placed) -> Any:
        """Return what was made, with its pictures copied out of their slot."""
        count = torch.Size(placed.shape).numel()
        images = self.room(placed.slot)[:count].view(placed.shape)
        pinned = torch.empty_like(images, pin_memory=torch.cuda.is_available()).copy_(images)
        return _with_images(placed.found, pinned)


class SlotLoader(DataLoader[Batch]):
    """A torch loader whose workers leave pictures in slots.

    Args:
        rows: makes batches.
        batches: gives requests.
        workers: processes, 1 or more.
        options: of the torch loader.
    """

    def __init__(self, rows: Maker, batches: Sampler[Any], workers: int, **options: Any) -> None:
        # One batch is being copied while others are made; and each slot stays with one worker, to
        # whom its pages are known.
        count = workers * (AHEAD + -(-2 // workers))
        self.slots = Slots(count)
        super().__init__(
            _Laid(rows, self.slots),
            batch_sampler=_InSlots(batches, count),
            num_workers=workers,
            prefetch_factor=AHEAD,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's own has no such need
        """Iterate over what was made."""
        for found in super().__iter__():
            yield self.slots.taken(found) if isinstance(found, Placed) else found


def can_share() -> bool:
    """Tell whether workers are forked, and so see memory made before them."""
    return multiprocessing.get_start_method() == "fork"


class _InSlots(Sampler[Any]):
    """Requests with the slot of each, in turn."""

    def __init__(self, batches: Sampler[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # ours have a length

    def __iter__(self) -> Iterator[Any]:
        return ((request, n % self.count) for n, request in enumerate(self.batches))


class _Laid(Dataset[Any]):
    """Makes batches and leaves their pictures in slots."""

    def __init__(self, rows: Maker, slots: Slots) -> None:
        self.rows, self.slots = rows, slots

    def __getitems__(self, asked: tuple[Any, int]) -> Any:
        request, slot = asked
        room = self.slots.room(slot)
        found = self.rows.make(request, room)
        batch = found if isinstance(found, Batch) else found.batch
        images = None if batch is None else batch.images
        if images is None or images.data_ptr() != room.data_ptr():
            return found
        return Placed(_with_images(found, None), slot, tuple(images.shape))


def _with_images(found: Any, images: Tensor | None) -> Any:
    if isinstance(found, Batch):
        return replace(found, images=images)
    return replace(found, batch=replace(found.batch, images=images))
