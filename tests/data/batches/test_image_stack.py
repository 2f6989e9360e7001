"""Images that were placed one by one are the batch that stacking them gives."""

import pytest
import torch

from mmcl.core import ProcessedSample
from mmcl.data.batches.collate import Example, collate
from mmcl.data.batches.shared_memory import ImageStack


def example(number, shape=(3, 4, 5), dtype=torch.uint8, is_channels_last=False):
    """An example of an image whose levels are its own; channels last in memory as a decoded one."""
    draw = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw).to(dtype)
    if is_channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return Example(ProcessedSample(image, torch.tensor([number])), number, 0, number, f"k{number}")


def listed(examples):
    """Every image of the examples, by loops over samples and their images."""
    found = []
    for one in examples:
        image = one.processed.image
        found += [image.tolist()] if image.dim() == 3 else [each.tolist() for each in image]
    return found


def place(stack, one):
    """An example whose images are in a stack."""
    return one._replace(processed=stack.place(one.processed))


def placed(examples, stack):
    """The batch of examples that were placed in a stack, and what they are afterwards."""
    own = [place(stack, one) for one in examples]
    return collate(own, stack=stack), own


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("room", [None, 4 * 60, 1000, 4 * 60 - 1])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_a_placed_batch_is_the_stacked_one(dtype, room, is_channels_last):
    examples = [example(n, dtype=dtype, is_channels_last=is_channels_last) for n in range(4)]
    buffer = None if room is None else torch.zeros(room, dtype=torch.uint8)
    batch, own = placed(examples, ImageStack(4, buffer))
    assert batch.images.tolist() == listed(examples) == listed(own)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous()
    assert batch.input_ids.tolist() == [[0], [1], [2], [3]]
    assert [one.key for one in own] == ["k0", "k1", "k2", "k3"]
    fits = room is not None and room >= 4 * 60 and dtype == torch.uint8
    assert fits == (buffer is not None and batch.images.data_ptr() == buffer.data_ptr())
    assert all(one.processed.image.data_ptr() != old.processed.image.data_ptr()
               for one, old in zip(own, examples, strict=True))  # fmt: skip


def test_of_fewer_examples_than_samples_the_batch_is_as_long_as_they_are():
    examples = [example(n) for n in range(3)]
    for buffer in (None, torch.zeros(1000, dtype=torch.uint8)):
        batch, _ = placed(examples, ImageStack(5, buffer))
        assert batch.images.tolist() == listed(examples)


def test_several_images_of_a_sample_keep_their_order_and_owner():
    examples = [example(0), example(1, (2, 3, 4, 5)), example(2)]
    for buffer in (None, torch.zeros(1000, dtype=torch.uint8)):
        batch, _ = placed(examples, ImageStack(3, buffer))
        assert batch.images.tolist() == listed(examples)
        assert batch.image_owner.tolist() == [0, 1, 1, 2]
        is_in_buffer = buffer is not None and batch.images.data_ptr() == buffer.data_ptr()
        # Of new memory there is a place for each sample, of a buffer all that it holds.
        assert is_in_buffer == (buffer is not None)


def test_samples_without_an_image_take_no_place():
    examples = [example(0), Example(ProcessedSample(None), 1, 0, 1, "k1"), example(2)]
    batch, _ = placed(examples, ImageStack(3))
    assert batch.images.tolist() == listed([examples[0], examples[2]])
    assert batch.image_owner.tolist() == [0, 2]
    batch, _ = placed(examples[1:2], ImageStack(1))
    assert batch.images is None


def test_images_of_several_sizes_are_refused_as_without_a_stack():
    examples = [example(0), example(1, (3, 5, 4))]
    with pytest.raises(RuntimeError, match="equal size"):
        collate(examples)
    with pytest.raises(RuntimeError, match="equal size"):
        placed(examples, ImageStack(2, torch.zeros(1000, dtype=torch.uint8)))


def test_a_batch_of_two_types_is_that_of_stacking():
    examples = [example(0), example(1, dtype=torch.float32)]
    batch, _ = placed(examples, ImageStack(2, torch.zeros(1000, dtype=torch.uint8)))
    assert batch.images.dtype == collate(examples).images.dtype
    assert batch.images.tolist() == listed(examples)


def test_a_transform_may_give_the_same_memory_for_every_image():
    canvas, stack, own = torch.zeros(3, 2, 2, dtype=torch.uint8), ImageStack(3), []
    for level in range(3):
        canvas.fill_(level)
        own.append(place(stack, Example(ProcessedSample(canvas), 0, 0, level, "")))
    assert collate(own, stack=stack).images.flatten(1).tolist() == [[0] * 12, [1] * 12, [2] * 12]
