import numpy as np
import torch
from PIL import Image

from mmcl.models import OpenCLIP
from mmcl.models.pictures import ClipTransform


def random_picture(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g)


def test_the_middle_is_what_pillow_makes_of_it():
    pixels = random_picture(96, 80)
    row = ClipTransform(48)(pixels, None, 0)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((0, 8, 80, 88))
    want = torch.from_numpy(np.array(picture.resize((48, 48), Image.Resampling.BICUBIC)))
    difference = (row.image.permute(1, 2, 0).int() - want.int()).abs()
    assert difference.max() <= 1


def test_a_crop_is_a_function_of_the_seed():
    transform = ClipTransform(32, crop=0.5)
    pixels = random_picture(64, 64)
    one, two = transform(pixels, None, 1).image, transform(pixels, None, 2).image
    assert torch.equal(one, transform(pixels, None, 1).image)
    assert not torch.equal(one, two)


def test_half_of_the_pictures_are_mirrored():
    pixels = random_picture(32, 32)
    plain, flips = ClipTransform(32, crop=1.0), ClipTransform(32, crop=1.0, flip=True)
    same = sum(
        torch.equal(plain(pixels, None, s).image, flips(pixels, None, s).image) for s in range(200)
    )
    assert 70 < same < 130


def test_texts_are_cut_behind_their_end():
    transform = OpenCLIP("tiny").transform(True)
    row = transform(random_picture(8, 8), "a red circle", 0)
    assert row.image.shape == (3, 64, 64)
    assert (row.tokens != 0).all()
    assert row.tokens.argmax() == len(row.tokens) - 1


def test_a_picture_of_one_pixel_is_no_trouble():
    assert ClipTransform(16, crop=0.1)(random_picture(1, 1), None, 3).image.shape == (3, 16, 16)
