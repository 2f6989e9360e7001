import io
import pickle
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from mmcl.core import IGNORE_INDEX, Batch
from mmcl.core.batch import text_ids
from tests.toys.toy_clip import a_batch


def test_taken_samples_come_in_the_given_order():
    batch = a_batch(6)
    taken = batch.take(torch.tensor([4, 0, 4]))
    assert taken.labels.tolist() == batch.labels[[4, 0, 4]].tolist()
    assert torch.equal(taken.images, batch.images[[4, 0, 4]])
    assert taken.keys == (batch.keys[4], batch.keys[0], batch.keys[4])


def test_images_follow_the_sample_that_owns_them():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    batch = Batch(images, torch.zeros(3), torch.zeros(3), image_owner=torch.tensor([0, 0, 2, 2]))
    taken = batch.take(torch.tensor([2, 0]))
    assert taken.images[:, 0, 0, 0].tolist() == [2, 3, 0, 1]
    assert taken.image_owner.tolist() == [0, 0, 1, 1]


def test_joined_texts_are_padded_to_the_longer():
    short = Batch(None, torch.zeros(1), torch.zeros(1), input_ids=torch.tensor([[5, 6]]))
    long = Batch(None, torch.zeros(1), torch.zeros(1), input_ids=torch.tensor([[7, 8, 9]]))
    for joined in (short.join(long), long.join(short)):
        assert joined.input_ids.shape == (2, 3)
        assert joined.attention_mask.sum().item() == 5


def test_joined_owners_are_offset_by_the_first_batch():
    one = a_batch(2)
    two = Batch(one.images, one.labels, one.task_ids, image_owner=torch.tensor([1, 0]))
    assert one.join(two).image_owner.tolist() == [0, 1, 3, 2]


def test_a_sample_is_new_unless_it_was_replayed():
    old = a_batch(2)
    old = old.join(old)
    assert not old.is_replay.any()


def test_features_do_not_join_images():
    images = a_batch(2)
    features = Batch(None, images.labels, images.task_ids, features=torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="one batch has features and the other has not"):
        images.join(features)


def test_a_batch_on_the_device_already_is_not_copied():
    batch = a_batch(2)
    assert batch.to("cpu") is batch


def test_unscored_is_what_cross_entropy_ignores():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE_INDEX


def test_a_pickled_batch_is_the_same_and_holds_no_shared_files():
    batch = Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, -100]), torch.tensor([0, -1]),
        in_loss=torch.tensor([True, False]), keys=("a", "b"), loss_weight=0.5,
    )  # fmt: skip
    sent = bytes(ForkingPickler.dumps(batch))
    assert b"rebuild_storage" not in sent
    again = pickle.load(io.BytesIO(sent))
    for name, value in vars(batch).items():
        other = getattr(again, name)
        assert value.equal(other) if isinstance(value, torch.Tensor) else value == other


def test_image_ids_go_with_their_samples():
    batch = replace(a_batch(4), image_ids=torch.tensor([7, 7, 8, -1]))
    assert batch.take(torch.tensor([2, 0])).image_ids.tolist() == [8, 7]
    assert batch.join(a_batch(2)).image_ids.tolist() == [7, 7, 8, -1, -1, -1]
    assert a_batch(2).join(batch).image_ids.tolist() == [-1, -1, 7, 7, 8, -1]
    assert a_batch(2).join(a_batch(2)).image_ids is None
    assert pickle.loads(pickle.dumps(batch)).image_ids.tolist() == [7, 7, 8, -1]
    assert batch.to("meta").image_ids.device.type == "meta"


def test_the_id_of_a_text_depends_on_its_real_tokens_alone():
    texts = torch.tensor([[4, 0, 9, 0], [4, 0, 9, 3], [4, 9, 0, 0], [9, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    ids = text_ids(texts, mask).tolist()
    assert ids[0] == ids[1]
    assert len(set(ids)) == 3  # token 0 counts where it is real, and so does the order
    shorter = text_ids(texts[:1, :3], mask[:1, :3])
    left = text_ids(torch.tensor([[5, 5, 4, 0, 9]]), torch.tensor([[0, 0, 1, 1, 1]]).bool())
    assert shorter.tolist() == left.tolist() == ids[:1]
    assert text_ids(texts, None).tolist() == text_ids(texts, torch.ones_like(mask)).tolist()


def _with_inputs(counts: list[int], first: int) -> Batch:
    """Answers to questions about ``counts`` images, each the patches and the grid of one image."""
    inputs = [
        {"pixel_values": torch.full((n + 1, 4), float(n)), "grid": torch.tensor([[1, n + 1, 1]])}
        for n in range(first, first + sum(counts))
    ]
    tokens = torch.ones(len(counts), 3, dtype=torch.int64)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Batch(
        None, tokens, torch.zeros(len(counts)), owner if sum(counts) else None, tokens,
        tokens > 0, image_inputs=tuple(inputs),
    )  # fmt: skip


def test_native_inputs_follow_their_samples_when_taken_and_joined() -> None:
    batch = _with_inputs([2, 0, 1], 0)
    taken = batch.take(torch.tensor([2, 1, 0, 2]))
    assert [int(one["grid"][0, 1]) - 1 for one in taken.image_inputs] == [2, 0, 1, 2]
    assert taken.image_owner is not None
    assert taken.image_owner.tolist() == [0, 2, 2, 3]
    both = batch.join(_with_inputs([1, 1], 7))
    assert [int(one["grid"][0, 1]) - 1 for one in both.image_inputs] == [0, 1, 2, 7, 8]
    assert both.image_owner is not None
    assert both.image_owner.tolist() == [0, 0, 2, 3, 4]


@pytest.mark.parametrize("is_first", [True, False])
def test_text_alone_joins_questions_about_images(is_first: bool) -> None:
    images = _with_inputs([1, 1], 0)
    pixels = replace(images, image_inputs=(), images=torch.zeros(2, 3, 4, 4))
    pixels = replace(pixels, image_owner=None)
    for seen in (images, pixels):
        alone = _with_inputs([0], 0)
        joined = alone.join(seen) if is_first else seen.join(alone)
        assert joined.image_owner is not None
        assert joined.image_owner.tolist() == ([1, 2] if is_first else [0, 1])
        assert len(joined.image_inputs) == len(seen.image_inputs)
        assert (joined.images is None) == (seen.images is None)


def test_native_inputs_are_pickled_and_moved() -> None:
    batch = _with_inputs([2, 1], 0)
    received = pickle.loads(pickle.dumps(batch))
    for one, other in zip(batch.image_inputs, received.image_inputs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    moved = batch.to("meta")
    assert all(t.is_meta for one in moved.image_inputs for t in one.values())
    assert batch.has_images
    assert not _with_inputs([0], 0).has_images
