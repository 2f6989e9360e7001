import numpy as np
import PIL
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn import functional

from mmcl.core.seeding import generator
from mmcl.models import OpenCLIP
from mmcl.models.open_clip.clip_transform import ClipTransform

# Before 13, Pillow resizes the width first even of tall images: other edges are clipped.
LARGEST, AVERAGE = (2, 0.1) if int(PIL.__version__.split(".")[0]) >= 13 else (24, 0.4)
"""Rounding of torch's resizing against Pillow's, in levels of 255."""


def random_image(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g)


def levels_of_open_clip(cfg, pixels):
    """Evaluation image of open_clip, with its normalization undone."""
    transform = image_transform_v2(cfg, is_train=False)
    normalized = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    return ((normalized * std + mean) * 255).round().int()


def expect_equal(ours, theirs, largest=LARGEST, average=AVERAGE):
    difference = (ours.int() - theirs).abs().float()
    assert ours.shape == theirs.shape
    assert difference.max() <= largest
    assert difference.mean() <= average


@pytest.mark.parametrize("size", [48, 57, (40, 56), (56, 40)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("height_width", [(96, 80), (71, 123), (20, 31), (200, 60)])
def test_evaluation_is_open_clips_own(size, resize_mode, interpolation, height_width):
    options = {"interpolation": interpolation, "resize_mode": resize_mode, "fill_color": 99}
    pixels = random_image(*height_width)
    ours = ClipTransform(size, **options)(pixels, None, 0).image
    expect_equal(ours, levels_of_open_clip(PreprocessCfg(size=size, **options), pixels))


@pytest.mark.parametrize(
    ("height_width", "resize_mode"),
    [
        ((48, 48), "shortest"),
        ((48, 48), "squash"),
        ((48, 90), "shortest"),  # only cropped
        ((91, 48), "shortest"),
        ((48, 31), "longest"),  # only padded
        ((17, 48), "longest"),
    ],
)
def test_an_image_that_is_not_resized_is_equal_to_the_bit(height_width, resize_mode):
    pixels, cfg = random_image(*height_width), PreprocessCfg(size=48, resize_mode=resize_mode)
    ours = ClipTransform(48, resize_mode=resize_mode)(pixels, None, 0).image
    expect_equal(ours, levels_of_open_clip(cfg, pixels), 0, 0)


def test_a_square_image_is_resized_as_a_whole():
    pixels = random_image(80, 80)
    want = functional.interpolate(pixels[None], (48, 48), mode="bicubic", antialias=True)[0]
    assert torch.equal(ClipTransform(48)(pixels, None, 0).image, want)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("height_width", [(1, 40000), (40000, 1), (1, 1), (3, 2)])
def test_an_image_of_any_aspect_has_the_models_size(height_width, resize_mode):
    pixels = random_image(*height_width)
    for size, sides in ((224, (224, 224)), ((32, 64), (32, 64))):
        image = ClipTransform(size, resize_mode=resize_mode)(pixels, None, 0).image
        assert (image.shape, image.dtype) == ((3, *sides), torch.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_training_crop_is_resized_with_the_models_interpolation(interpolation):
    pixels = random_image(90, 70)
    sample = ClipTransform(48, random_crop_scale=1.0, interpolation=interpolation)(pixels, None, 4)
    # area and aspect of the crop, drawn as the transform's docstring says
    _, aspect, down, right, _ = torch.rand(5, generator=generator(4)).tolist()
    ratio = np.exp((2 * aspect - 1) * np.log(4 / 3))
    tall = min(90, round(np.sqrt(90 * 70 / ratio)))
    wide = min(70, round(np.sqrt(90 * 70 * ratio)))
    top, left = int(down * (91 - tall)), int(right * (71 - wide))
    crop = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    crop = crop.crop((left, top, left + wide, top + tall))
    resampling = getattr(Image.Resampling, interpolation.upper())
    want = torch.from_numpy(np.array(crop.resize((48, 48), resampling))).permute(2, 0, 1)
    expect_equal(sample.image, want.int())


def test_random_interpolation_is_one_of_two_drawn_by_the_seed():
    pixels = random_image(60, 60)

    def crop(mode, seed):
        transform = ClipTransform(32, random_crop_scale=0.5, interpolation=mode)
        return transform(pixels, None, seed).image

    is_bilinear = []
    for seed in range(40):
        got = crop("random", seed)
        known = [torch.equal(got, crop(mode, seed)) for mode in ("bicubic", "bilinear")]
        assert sum(known) == 1
        is_bilinear.append(known[1])
    assert 8 < sum(is_bilinear) < 32


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
