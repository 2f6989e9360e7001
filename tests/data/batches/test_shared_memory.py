"""Batches come out of workers as they were made, and stay so."""

import multiprocessing

import pytest
import torch
from torch.utils.data import Sampler

from mmcl.core import Batch
from mmcl.data.batches.shared_memory import (
    SharedBatch,
    SharedBuffers,
    SharedMemoryDataLoader,
    make_dataloader,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="needs forked workers"),
]


class IntArray(Sampler):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.count))


class Maker:
    """Batch n is all n, of 1 + n % 3 samples; its images go into the buffer if there is one."""

    def __init__(self, side=8, dtype=torch.uint8):
        self.side, self.dtype = side, dtype

    def make(self, request, room=None):
        shape = (1 + request % 3, 3, self.side, self.side)
        images = torch.full(shape, request, dtype=self.dtype)
        if room is not None and self.dtype == torch.uint8 and images.nbytes <= len(room):
            images = room[: images.nbytes].view(shape).copy_(images)
        rows = torch.full((shape[0],), request)
        return Batch(images, rows, rows)


def identity(batch):
    return batch


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_batch_is_whole_and_is_not_written_over(workers, dtype):
    loader = SharedMemoryDataLoader(
        Maker(dtype=dtype), IntArray(40), workers, collate_fn=identity, persistent_workers=True
    )
    assert len(loader) == 40
    for _ in range(2):
        kept = list(loader)
        assert len(kept) == 40
        for number, batch in enumerate(kept):
            assert len(batch) == 1 + number % 3
            assert (batch.images == number).all()
            assert batch.images.dtype == dtype
            assert (batch.labels == number).all()
    loader._iterator._shutdown_workers()


def filled(slots, index, value):
    """A collected batch of one 2x2 image whose levels are all ``value``."""
    slots.buffer(index)[:12] = value
    nothing = torch.zeros(1, dtype=torch.int64)
    return slots.collect(SharedBatch(Batch(None, nothing, nothing), index, (1, 3, 2, 2)))


def test_images_stay_in_their_buffer_until_the_last_view_of_them_is_gone():
    slots, owner = SharedBuffers(1), object()
    batch = filled(slots, slots.request(0, owner), 7)
    assert batch.images.data_ptr() == slots.buffer(0).data_ptr()
    view = batch.images[0, 1]
    del batch
    others = [slots.request(0, owner) for _ in range(len(slots) - 1)]
    assert sorted(others) == list(range(1, len(slots)))
    assert slots.request(0, owner) is None
    assert (view == 7).all()
    del view
    assert slots.request(0, owner) == 0


def test_who_keeps_many_batches_gets_copies():
    slots, owner = SharedBuffers(2), object()
    batches = []
    for value in range(50):
        batches.append(filled(slots, slots.request(value % 2, owner), value))
    for value, batch in enumerate(batches):
        assert (batch.images == value).all()
    lent = {slots.buffer(n).data_ptr() for n in range(len(slots))}
    assert sum(batch.images.data_ptr() in lent for batch in batches) == 2


def test_buffers_of_an_abandoned_pass_are_free_again():
    loader = SharedMemoryDataLoader(Maker(), IntArray(40), 1, collate_fn=identity)
    for _ in range(5):
        assert int(next(iter(loader)).images.max()) == 0
    slots = loader.slots
    assert sorted(slots.request(0, loader) for _ in range(len(slots))) == list(range(len(slots)))


def test_without_memory_for_buffers_torch_transfers_the_batches(monkeypatch):
    def refuse(count):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmcl.data.batches.shared_memory.SharedBuffers", refuse)

    class Rows(Maker):
        def __getitems__(self, request):
            return self.make(request)

    batches = list(make_dataloader(Rows(), IntArray(5), 1, seed=0, stay=False))
    assert [int(batch.images.max()) for batch in batches] == [0, 1, 2, 3, 4]
