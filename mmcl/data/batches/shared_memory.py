"""Shared memory in which a loader's workers hand over images; its buffers are reused.

torch sends every tensor of a worker as a new file in shared memory. Its pages are new to both
processes, and faulting them in costs more than decoding does. Here a worker stacks images into a
shared buffer, the main process copies them out, and the buffer's pages stay mapped. The memory is
anonymous: a killed run leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mmcl.core import Batch
from mmcl.core.seeding import generator

AHEAD = 2
"""Prefetch factor: batches that each worker makes ahead; torch's own default."""

_BUFFER_BYTES = 1 << 28
"""Size of a buffer, in address space, not in memory; larger batches are transferred by torch."""


class BatchMaker(Protocol):
    """Dataset that makes batches in a worker."""

    def make(self, request: Any, room: Tensor | None = None) -> Any:
        """Return a Batch, or an object with one as ``batch``, for an element of the batch sampler.

        Its images are in the buffer ``room``, (bytes,) uint8, if they fit.
        """
        ...


@dataclass(frozen=True)
class SharedBatch:
    """Result of a worker whose images are in a shared buffer.

    Attributes:
        found: the result without images.
        slot: index of the buffer.
        shape: shape of the images, uint8.
    """

    found: Any
    slot: int
    shape: tuple[int, ...]


class SharedBuffers:
    """Shared-memory buffers of forked workers and the process that made them.

    Args:
        count: number of buffers.
    """

    def __init__(self, count: int) -> None:
        self._maps = [mmap.mmap(-1, _BUFFER_BYTES) for _ in range(count)]
        self._buffers = [torch.frombuffer(one, dtype=torch.uint8) for one in self._maps]

    def __len__(self) -> int:
        """Return the number of buffers."""
        return len(self._buffers)

    def buffer(self, index: int) -> Tensor:
        """Return (bytes,) uint8, a whole buffer."""
        return self._buffers[index]

    def collect(self, placed: SharedBatch) -> Any:
        """Return a worker's result, with its images copied out of their buffer."""
        count = torch.Size(placed.shape).numel()
        images = self.buffer(placed.slot)[:count].view(placed.shape)
        pinned = torch.empty_like(images, pin_memory=torch.cuda.is_available()).copy_(images)
        return _with_images(placed.found, pinned)


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
        # One batch is being copied while others are made; and each buffer stays with one worker,
        # which has its pages mapped.
        count = workers * (AHEAD + -(-2 // workers))
        self.slots = SharedBuffers(count)
        super().__init__(
            _SharedMemoryDataset(dataset, self.slots),
            batch_sampler=_WithBuffers(batches, count),
            num_workers=workers,
            prefetch_factor=AHEAD,
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch's own has no such need
        """Iterate over the workers' results."""
        for result in super().__iter__():
            yield self.slots.collect(result) if isinstance(result, SharedBatch) else result


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
    # Forked workers see memory made before them.
    if workers and multiprocessing.get_start_method() == "fork":
        # Without the address space for shared buffers, torch transfers the images itself.
        with contextlib.suppress(OSError):
            return SharedMemoryDataLoader(
                dataset, batches, workers, persistent_workers=stay, **options
            )
    return DataLoader(
        cast("Dataset[Batch]", dataset),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=stay and workers > 0,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def _identity(batch: Any) -> Any:
    return batch


class _WithBuffers(Sampler[Any]):
    """Sampler of (request, index of a shared buffer); the buffers take turns."""

    def __init__(self, batches: Sampler[Any], count: int) -> None:
        self.batches, self.count = batches, count

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # ours have a length

    def __iter__(self) -> Iterator[Any]:
        return ((request, n % self.count) for n, request in enumerate(self.batches))


class _SharedMemoryDataset(Dataset[Any]):
    """Dataset that makes batches and leaves their images in shared buffers."""

    def __init__(self, dataset: BatchMaker, buffers: SharedBuffers) -> None:
        self.dataset, self.buffers = dataset, buffers

    def __getitems__(self, request_and_buffer: tuple[Any, int]) -> Any:
        request, index = request_and_buffer
        buffer = self.buffers.buffer(index)
        result = self.dataset.make(request, buffer)
        batch = result if isinstance(result, Batch) else result.batch
        images = None if batch is None else batch.images
        if images is None or images.data_ptr() != buffer.data_ptr():
            return result
        return SharedBatch(_with_images(result, None), index, tuple(images.shape))


def _with_images(result: Any, images: Tensor | None) -> Any:
    if isinstance(result, Batch):
        return replace(result, images=images)
    return replace(result, batch=replace(result.batch, images=images))
