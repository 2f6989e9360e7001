"""Shared memory in which a loader's workers hand over images; its buffers are reused.

torch sends every tensor of a worker as a new file in shared memory. Its pages are new to both
processes, and faulting them in costs more than decoding does. Here a worker stacks images into a
shared buffer whose pages stay mapped, and the main process uses them there: a buffer is lent to the
batch, and taken back when nothing of its images is referenced any more. Who keeps more batches than
there are buffers to lend gets copies. The memory is anonymous: a killed run leaves nothing behind.
Without workers the buffers spare mapping new memory for every batch.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import Batch, ProcessedSample
from mmcl.core.seeding import generator

AHEAD = 2
"""Prefetch factor: batches that each worker makes ahead; torch's own default."""

_BUFFER_BYTES = 1 << 28
"""Size of a buffer, in address space, not in memory; larger batches are transferred by torch."""


class ImageStack:
    """Stack of the images of a batch, to which each is copied as soon as it is made.

    Then it is still in the processor's cache, and the memory that it leaves serves the next one, as
    it does not when all images of a batch are kept and stacked at its end.

    Args:
        count: number of samples.
        room: (bytes,) uint8 buffer for them if they fit; None = new memory.
    """

    def __init__(self, count: int, room: Tensor | None = None) -> None:
        self._count, self._room = count, room
        self._memory: Tensor | None = None
        self._places: tuple[Tensor, ...] = ()
        self._placed = 0

    def place(self, processed: ProcessedSample) -> ProcessedSample:
        """Return a sample with its images in the next places; itself where there are none."""
        image = processed.image
        if image is None:
            return processed
        if self._memory is None:
            self._memory = self._allocated(image)
            self._places = self._memory[: self._count].unbind()
        start, end = self._placed, self._placed + (1 if image.dim() == 3 else len(image))
        if end > len(self._memory) or image.dtype != self._memory.dtype:
            return processed
        if image.dim() > 3:
            place = self._memory[start:end]
        else:
            place = self._places[start] if end <= len(self._places) else self._memory[start]
        if image.shape[-3:] != place.shape[-3:]:
            return processed
        if image.dtype == torch.uint8:
            # From channels last to planes, numpy copies bytes in half the time of torch.
            np.copyto(place.numpy(), image.numpy())
        else:
            place.copy_(image)
        self._placed = end
        return replace(processed, image=place)

    def images(self, count: int) -> Tensor | None:
        """Return the (count, 3, H, W) images, all of which were placed; None if some were not."""
        if self._memory is None or count != self._placed:
            return None
        return self._memory[:count]

    def _allocated(self, image: Tensor) -> Tensor:
        room, shape = self._room, image.shape[-3:]
        size = shape.numel() * image.itemsize
        if room is None or image.dtype != torch.uint8 or self._count * size > len(room):
            return image.new_empty((self._count, *shape))
        # As many as fit: some samples have several images, or several captions of their image.
        fit = len(room) // max(1, size)
        return room[: fit * size].view(fit, *shape)


class BatchMaker(Protocol):
    """Dataset that makes batches in a worker."""

    def make(self, request: Any, room: Tensor | None = None) -> Any:
        """Return a Batch, or an object with one as ``batch``, for an element of the batch sampler.

        Its images are in the buffer ``room``, (bytes,) uint8, if they fit.
        """
        ...


@dataclass(frozen=True)
class SharedBatch:
    """Result of a worker that was given a shared buffer.

    Attributes:
        found: the result, without its images if they are in the buffer.
        slot: index of the buffer.
        shape: shape of the images in it, uint8; None = there are none.
    """

    found: Any
    slot: int
    shape: tuple[int, ...] | None


class SharedBuffers:
    """Shared-memory buffers of forked workers and the process that made them.

    A buffer is free, requested (a worker may write into it) or lent (a batch refers to it).

    Args:
        workers: number of workers; each has buffers of its own as long as one of them is free,
            so that its pages are mapped once. 0 = the process that made them writes into them.
    """

    def __init__(self, workers: int) -> None:
        self._workers = max(1, workers)
        # A loop holds a batch while it fetches the next.
        self._most_lent = max(2, workers)
        # Requested at once: AHEAD of each worker, and one that arrived as the next was requested.
        count = max(1, workers * (AHEAD + 1)) + self._most_lent
        self._maps = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(count)]
        self._requested: dict[int, object] = {}
        self._lent: dict[int, weakref.ref[Any]] = {}

    def __len__(self) -> int:
        """Return the number of buffers."""
        return len(self._maps)

    def buffer(self, index: int) -> Tensor:
        """Return (bytes,) uint8, a whole buffer."""
        return torch.frombuffer(self._maps[index], dtype=torch.uint8)

    def request(self, worker: int, owner: object) -> int | None:
        """Return the index of a free buffer for a worker, now requested; None if none is free."""
        self._take_back()
        free = [n for n in range(len(self)) if n not in self._requested and n not in self._lent]
        if not free:
            return None
        chosen = min(free, key=lambda n: (n % self._workers != worker, n))
        self._requested[chosen] = owner
        return chosen

    def release(self, owner: object) -> None:
        """Free the buffers that an owner requested and did not collect."""
        self._requested = {n: who for n, who in self._requested.items() if who is not owner}

    def collect(self, placed: Any) -> Any:
        """Return a result with its images, in their buffer if it is a SharedBatch that has one."""
        if not isinstance(placed, SharedBatch):
            return placed
        self._requested.pop(placed.slot, None)
        if placed.shape is None:
            return placed.found
        self._take_back()
        count = torch.Size(placed.shape).numel()
        array = np.frombuffer(self._maps[placed.slot], dtype=np.uint8, count=count)
        images = torch.from_numpy(array).view(placed.shape)
        if torch.cuda.is_available():
            images = torch.empty_like(images, pin_memory=True).copy_(images)
        elif len(self._lent) >= self._most_lent:
            images = images.clone()
        else:
            # The tensor's storage holds the array, so this ends with the last view of it.
            self._lent[placed.slot] = weakref.ref(array)
        return _with_images(placed.found, images)

    def _take_back(self) -> None:
        self._lent = {n: array for n, array in self._lent.items() if array() is not None}


class SharedMemoryDataLoader(DataLoader[Batch]):
    """DataLoader whose workers leave images in shared buffers.

    Args:
        dataset: makes batches.
        batches: sampler of the requests.
        workers: processes, 1 or more.
        options: further arguments of torch's DataLoader.
    """

    def __init__(
        self, dataset: BatchMaker, batches: Sampler[Any], workers: int, **options: Any
    ) -> None:
        self.slots = SharedBuffers(workers)
        super().__init__(
            _SharedMemoryDataset(dataset, self.slots),
            batch_sampler=_WithBuffers(batches, self.slots, workers),
            num_workers=workers,
            prefetch_factor=AHEAD,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's own has no such need
        """Iterate over the workers' results."""
        yield from map(self.slots.collect, super().__iter__())


class ReusedMemoryDataLoader(DataLoader[Batch]):
    """DataLoader without workers whose batches have their images in buffers that are reused.

    Args:
        dataset: makes batches.
        batches: sampler of the requests.
        stay: whether the buffers stay between passes; else they are freed at the end of each.
        options: further arguments of torch's DataLoader.
    """

    def __init__(
        self, dataset: BatchMaker, batches: Sampler[Any], *, stay: bool, **options: Any
    ) -> None:
        super().__init__(cast("Dataset[Batch]", dataset), batch_sampler=batches, **options)
        self._stay = stay
        self._buffers: SharedBuffers | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's own has no such need
        """Iterate over the results of the dataset."""
        buffers = self._buffers
        if buffers is None:
            try:
                buffers = SharedBuffers(0)
            except OSError:  # without the address space for them, in new memory
                yield from super().__iter__()
                return
            self._buffers = buffers if self._stay else None
        maker = _SharedMemoryDataset(cast(BatchMaker, self.dataset), buffers)
        requests = _Requests(iter(cast("Sampler[Any]", self.batch_sampler)), buffers, 1)
        for request in requests:
            yield buffers.collect(maker.__getitems__(request))


def make_dataloader(
    dataset: BatchMaker, batches: Sampler[Any], workers: int, *, seed: int,
    stay: bool = True,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a torch DataLoader whose dataset makes whole batches.

    Args:
        dataset: maps a request to a batch.
        batches: sampler of the requests.
        workers: processes that make batches, 0 = this process.
        seed: seed of torch's own draws in the loader.
        stay: whether the workers stay between passes.
    """
    options: dict[str, Any] = {
        "collate_fn": _identity,
        # A generator of its own: otherwise every iter() draws from torch's global one.
        "generator": generator(seed),
    }
    if workers == 0:
        return ReusedMemoryDataLoader(dataset, batches, stay=stay, **options)
    # Forked workers see memory made before them.
    if multiprocessing.get_start_method() == "fork":
        # Without the address space for shared buffers, torch transfers the images itself.
        with contextlib.suppress(OSError):
            return SharedMemoryDataLoader(
                dataset, batches, workers, persistent_workers=stay, **options
            )
    return DataLoader(
        cast("Dataset[Batch]", dataset),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=stay,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _identity(batch: Any) -> Any:
    return batch


class _WithBuffers(Sampler[Any]):
    """Sampler of (request, index of a shared buffer or None)."""

    def __init__(self, batches: Sampler[Any], buffers: SharedBuffers, workers: int) -> None:
        self.batches, self.buffers, self.workers = batches, buffers, workers

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # ours have a length

    def __iter__(self) -> Iterator[Any]:
        return _Requests(iter(self.batches), self.buffers, self.workers)


class _Requests(Iterator[Any]):
    """Requests of one pass; torch gives request n to worker n modulo the workers.

    Its buffers are free again once it is deleted: torch keeps it until its workers have ended or
    have answered everything that was requested.
    """

    def __init__(self, requests: Iterator[Any], buffers: SharedBuffers, workers: int) -> None:
        self.requests, self.buffers, self.workers = requests, buffers, workers
        self.count, self.owner = 0, object()

    def __next__(self) -> tuple[Any, int | None]:
        request = next(self.requests)
        buffer = self.buffers.request(self.count % self.workers, self.owner)
        self.count += 1
        return request, buffer

    def __del__(self) -> None:
        self.buffers.release(self.owner)


class _SharedMemoryDataset(Dataset[Any]):
    """Dataset that makes batches and leaves their images in shared buffers."""

    def __init__(self, dataset: BatchMaker, buffers: SharedBuffers) -> None:
        self.dataset, self.buffers = dataset, buffers

    def __getitems__(self, request_and_buffer: tuple[Any, int | None]) -> Any:
        request, index = request_and_buffer
        if index is None:
            return self.dataset.make(request)
        buffer = self.buffers.buffer(index)
        result = self.dataset.make(request, buffer)
        batch = result if isinstance(result, Batch) else result.batch
        images = None if batch is None else batch.images
        if images is None or images.data_ptr() != buffer.data_ptr():
            return SharedBatch(result, index, None)
        return SharedBatch(_with_images(result, None), index, tuple(images.shape))


def _with_images(result: Any, images: Tensor | None) -> Any:
    if isinstance(result, Batch):
        return replace(result, images=images)
    return replace(result, batch=replace(result.batch, images=images))
