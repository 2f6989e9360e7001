import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from mmcl.core import UNSCORED, Batch
from tests.stand_in import a_batch


def test_taken_rows_come_in_the_order_asked():
    batch = a_batch(6)
    taken = batch.take(torch.tensor([4, 0, 4]))
    assert taken.labels.tolist() == batch.labels[[4, 0, 4]].tolist()
    assert torch.equal(taken.images, batch.images[[4, 0, 4]])
    assert taken.keys == (batch.keys[4], batch.keys[0], batch.keys[4])


def test_pictures_follow_the_row_that_owns_them():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batch = Batch(images, torch.zeros(3), torch.zeros(3), owner=torch.tensor([0, 0, 2, 2]))
    taken = batch.take(torch.tensor([2, 0]))
    assert taken.images[:, 0, 0, 0].tolist() == [2, 3, 0, 1]
    assert taken.owner.tolist() == [0, 0, 1, 1]


def test_joined_texts_are_padded_to_the_longer():
    short = Batch(None, torch.zeros(1), torch.zeros(1), tokens=torch.tensor([[5, 6]]))
    long = Batch(None, torch.zeros(1), torch.zeros(1), tokens=torch.tensor([[7, 8, 9]]))
    for joined in (short.join(long), long.join(short)):
        assert joined.tokens.shape == (2, 3)
        assert joined.mask.sum().item() == 5


def test_joined_owners_count_on():
    one = a_batch(2)
    two = Batch(one.images, one.labels, one.task, owner=torch.tensor([1, 0]))
    assert one.join(two).owner.tolist() == [0, 1, 3, 2]


def test_a_row_is_new_unless_it_was_recalled():
    old = a_batch(2)
    old = old.join(old)
    assert not old.recalled.any()


def test_features_do_not_join_pictures():
    pictures = a_batch(2)
    features = Batch(None, pictures.labels, pictures.task, features=torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="one batch has features and the other has not"):
        pictures.join(features)


def test_a_batch_that_is_there_already_is_not_copied():
    batch = a_batch(2)
    assert batch.to("cpu") is batch


def test_unscored_is_what_cross_entropy_ignores():
    assert torch.nn.CrossEntropyLoss().ignore_index == UNSCORED


def test_a_pickled_batch_is_the_same_and_holds_no_shared_files():
    batch = Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, -100]), torch.tensor([0, -1]),
        scored=torch.tensor([True, False]), keys=("a", "b"), weight=0.5,
    )  # fmt: skip
    sent = bytes(ForkingPickler.dumps(batch))
    assert b"rebuild_storage" not in sent
    again = pickle.load(io.BytesIO(sent))
    for name, value in vars(batch).items():
        other = getattr(again, name)
        assert value.equal(other) if isinstance(value, torch.Tensor) else value == other
