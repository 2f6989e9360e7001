"""Batches come out of workers as they were made, and stay so."""

import pytest
import torch
from torch.utils.data import Sampler

from mmcl.core import Batch
from mmcl.data.transport import Placed, SlotLoader, Slots, can_share

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_share(), reason="needs forked workers"),
]


class Numbers(Sampler):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(range(self.count))


class Maker:
    """Batch n is all n, of 1 + n % 3 rows; its pictures go into the room where there is one."""

    def __init__(self, side=8, dtype=torch.uint8):
        self.side, self.dtype = side, dtype

    def make(self, request, room=None):
        shape = (1 + request % 3, 3, self.side, self.side)
        images = torch.full(shape, request, dtype=self.dtype)
        if room is not None and self.dtype == torch.uint8 and images.nbytes <= len(room):
            images = room[: images.nbytes].view(shape).copy_(images)
        rows = torch.full((shape[0],), request)
        return Batch(images, rows, rows)


def as_it_is(batch):
    return batch


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_batch_is_whole_and_is_not_written_over(workers, dtype):
    loader = SlotLoader(
        Maker(dtype=dtype), Numbers(40), workers, collate_fn=as_it_is, persistent_workers=True
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


def test_pictures_are_copied_out_of_their_slot():
    slots = Slots(1)
    room = slots.room(0)
    room[:12] = 7
    nothing = torch.zeros(1, dtype=torch.int64)
    batch = slots.taken(Placed(Batch(None, nothing, nothing), 0, (1, 3, 2, 2)))
    room[:12] = 9
    assert (batch.images == 7).all()


def test_without_room_for_slots_batches_come_torch_s_way(monkeypatch):
    from mmcl.data import loader

    def refuse(count):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmcl.data.transport.Slots", refuse)

    class Rows(Maker):
        def __getitems__(self, request):
            return self.make(request)

    batches = list(loader.batch_loader(Rows(), Numbers(5), 1, seed=0, stay=False))
    assert [int(batch.images.max()) for batch in batches] == [0, 1, 2, 3, 4]
