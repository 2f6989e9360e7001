import numpy as np
import torch
from PIL import Image

from mmcl.models import OpenCLIP
from mmcl.models.open_clip.clip_transform import ClipTransform


def random_image(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g)


def test_the_center_crop_is_pillows():
    pixels = random_image(96, 80)
    sample = ClipTransform(48)(pixels, None, 0)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((0, 8, 80, 88))
    want = torch.from_numpy(np.array(image.resize((48, 48), Image.Resampling.BICUBIC)))
    difference = (sample.image.permute(1, 2, 0).int() - want.int()).abs()
    assert difference.max() <= 1


def test_a_crop_is_a_function_of_the_seed():
    transform = ClipTransform(32, random_crop_scale=0.5)
    pixels = random_image(64, 64)
    one, two = transform(pixels, None, 1).image, transform(pixels, None, 2).image
    assert torch.equal(one, transform(pixels, None, 1).image)
    assert not torch.equal(one, two)


def test_half_of_the_images_are_mirrored():
    pixels = random_image(32, 32)
    plain, flips = (
        ClipTransform(32, random_crop_scale=1.0),
        ClipTransform(32, random_crop_scale=1.0, horizontal_flip=True),
    )
    same = sum(
        torch.equal(plain(pixels, None, s).image, flips(pixels, None, s).image) for s in range(200)
    )
    assert 70 < same < 130


def test_texts_are_trimmed_after_their_end():
    transform = OpenCLIP("tiny").transform(True)
    sample = transform(random_image(8, 8), "a red circle", 0)
    assert sample.image.shape == (3, 64, 64)
    assert (sample.input_ids != 0).all()
    assert sample.input_ids.argmax() == len(sample.input_ids) - 1


def test_an_image_of_one_pixel_is_resized():
    assert ClipTransform(16, random_crop_scale=0.1)(random_image(1, 1), None, 3).image.shape == (
        3,
        16,
        16,
    )
