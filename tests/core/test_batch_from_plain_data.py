"""Batches of what people have: tensors, labels, texts."""

import pytest
import torch

from mmcl.core import Batch, step
from mmcl.models import OpenCLIP
from mmcl.strategies import Finetune


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
        (torch.full((1, 3, 4, 4), -2.1), None, "range from -2.10 to -2.10, expected 0 to 1: if t"),
        (torch.full((1, 3, 4, 4), 200.0), None, "0 to 255, give images_are='uint8'"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), None, "images are torch.int64: give uint8"),
        (torch.zeros(3, 4, 4), None, r"images has shape \(3, 4, 4\), expected \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 4, 4), None, r"images has shape \(1, 1, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), [1], r"labels has shape \(1,\) for 2 samples: give one for each"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_images(images, labels)


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def normalized(levels):
    """What ToTensor and Normalize make of levels, in loops over channels."""
    unit = levels.float() / 255
    parts = [(unit[:, c] - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(parts, 1)


def test_normalized_images_are_the_levels_they_were():
    levels = torch.arange(256).to(torch.uint8).repeat(2, 3, 1).view(2, 3, 16, 16)
    batch = Batch.from_images(normalized(levels), images_are="normalized", mean=MEAN, std=STD)
    assert torch.equal(batch.images, levels)


def test_float_levels_are_rounded():
    batch = Batch.from_images(torch.full((1, 3, 2, 2), 199.6), images_are="uint8")
    assert batch.images.unique().tolist() == [200]


@pytest.mark.parametrize(
    ("images", "given", "message"),
    [
        (torch.zeros(1, 3, 2, 2), {"images_are": "float"}, "is 'float': choose uint8, u"),
        (torch.zeros(1, 3, 2, 2), {"images_are": "normalized"}, "'normalized' without mean and"),
        (torch.zeros(1, 3, 2, 2), {"images_are": "normalized", "mean": [0.5], "std": STD},
         "mean has 1 numbers: give one for each"),
        (torch.full((1, 3, 2, 2), 9.0), {"images_are": "normalized", "mean": MEAN, "std": STD},
         "after Normalize is undone, expected 0 to 1: mean or std are not its own"),
        (torch.full((1, 3, 2, 2), 2.0), {"images_are": "unit"}, "2.00 and images_are is 'unit'"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.uint8), {"images_are": "unit"},
         "images are torch.uint8 and images_are is 'unit'"),
    ],
)  # fmt: skip
def test_images_that_are_not_what_is_said_are_refused(images, given, message):
    with pytest.raises(ValueError, match=message):
        Batch.from_images(images, **given)


def test_a_model_refuses_floats_that_it_would_normalize_twice_and_other_sizes():
    model = OpenCLIP("tiny", pretrained="built-in")
    labels = torch.zeros(1, dtype=torch.int64)
    for images, message in (
        (torch.zeros(1, 3, 64, 64), "images are torch.float32, expected uint8: .*from_images"),
        (
            torch.zeros(1, 3, 40, 30, dtype=torch.uint8),
            "are 40 x 30, this model takes 64 x 64",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.embed(Batch(images, labels, labels), "image")


def test_a_label_beyond_the_classes_is_named_with_their_number():
    model = OpenCLIP("tiny", pretrained="built-in")
    model.set_classes(["a", "b"], ["{}"])
    batch = Batch.from_images(torch.zeros(2, 3, 64, 64), [0, 2])
    with pytest.raises(ValueError, match="labels go from 0 to 2 and the model has 2 classes: call"):
        model.loss(model(batch), batch)


@pytest.mark.parametrize("given", [(torch.zeros(1, 3, 4, 4), torch.zeros(1)), {"image": 1}])
def test_a_step_with_what_is_no_batch_names_what_makes_one(given):
    with pytest.raises(TypeError, match=r"given a (tuple|dict), expected a mmcl.Batch: "):
        step(None, Finetune(), given)


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
