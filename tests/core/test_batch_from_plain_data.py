"""Batches of what people have: tensors, labels, texts."""

import pytest
import torch

from mmcl.core import Batch


def test_floats_from_0_to_1_become_the_uint8_that_torchvision_reads():
    pixels = torch.arange(256).to(torch.uint8).repeat(2, 3, 1).view(2, 3, 16, 16)
    batch = Batch.from_images(pixels.float() / 255, [3, 1], task=2)
    assert torch.equal(batch.images, pixels)
    assert (batch.labels.tolist(), batch.task_ids.tolist()) == ([3, 1], [2, 2])
    assert batch.labels.dtype == batch.task_ids.dtype == torch.int64


def test_uint8_stays_and_images_without_labels_are_not_in_the_loss():
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    batch = Batch.from_images(list(images), task=torch.tensor([0, 1, 0]))
    assert torch.equal(batch.images, images)
    assert batch.labels.tolist() == [-100] * 3
    assert batch.task_ids.tolist() == [0, 1, 0]


def test_labels_may_be_a_tensor_of_any_integer_type():
    batch = Batch.from_images(torch.zeros(2, 3, 4, 4), torch.tensor([1, 0], dtype=torch.int32))
    assert batch.labels.tolist() == [1, 0]
    assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((1, 3, 4, 4), -2.1), None, "range from -2.10 to -2.10, expected 0 to 1: leave"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), None, "images are torch.int64: give uint8"),
        (torch.zeros(3, 4, 4), None, r"images has shape \(3, 4, 4\), expected \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 4, 4), None, r"images has shape \(1, 1, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), [1], r"labels has shape \(1,\) for 2 samples: give one for each"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_images(images, labels)


def words(texts):
    """A tokenizer: one id for each letter, padded with 0."""
    longest = max(map(len, texts))
    return torch.tensor([[ord(c) for c in text.ljust(longest, "\0")] for text in texts])


def test_texts_are_tokenized_and_their_padding_is_masked():
    batch = Batch.from_texts(["ab", "c"], torch.zeros(2, 3, 4, 4), tokenizer=words, task=1)
    assert batch.input_ids.tolist() == [[97, 98], [99, 0]]
    assert batch.attention_mask.tolist() == [[True, True], [True, False]]
    assert batch.labels.tolist() == [-100, -100]
    assert batch.task_ids.tolist() == [1, 1]
    assert batch.images.shape == (2, 3, 4, 4)


def test_texts_need_no_images():
    batch = Batch.from_texts(["ab"], tokenizer=words)
    assert batch.images is None
    assert len(batch) == 1


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("ab", "texts is 'ab': give a list with one text for each sample"),
        ([], "texts is .*: give a list"),
        (["a"], "there are 1 texts for 2 images: give one each"),
    ],
)
def test_texts_that_do_not_fit_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_texts(texts, torch.zeros(2, 3, 4, 4), tokenizer=words)
