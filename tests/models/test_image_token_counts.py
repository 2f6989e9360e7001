"""Tokens of images are counted from their sizes, about as the model's own processor makes them."""

import pickle

import pytest
import torch

from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.architectures import ARCHITECTURES
from mmcl.models.hf_vlm.native_inputs import NativeProcessor
from tests.models.family_reference import SAMPLES, dialogue
from tests.models.small_families import FAMILIES, write_family

SIZES = ((20, 36), (16, 16), (44, 20), (200, 300), (96, 64))
WITHOUT_FORMULA = ("lfm2_vl", "smolvlm")
"""Families for which transformers has no right one: sides count as the next multiple of 32."""


def native(family):
    _, config, processor = FAMILIES[family]()
    is_joint = ARCHITECTURES[config.model_type].is_joint
    return NativeProcessor(processor, frozenset(), is_joint)


def made(processor, sizes):
    """Tokens that a processor makes of noise of these sizes, as one sample."""
    g = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *s), generator=g, dtype=torch.uint8) for s in sizes]
    encode = processor.processor.tokenizer.encode
    return sum(len(encode(text, add_special_tokens=False)) for text in processor(images)[1])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_counts_are_those_of_the_processor(family):
    processor = native(family)
    is_rounded = family in WITHOUT_FORMULA
    sizes = [tuple(-(-n // 32) * 32 for n in s) for s in SIZES] if is_rounded else SIZES
    for size in sizes:
        real = made(processor, [size])
        assert abs(processor.count_tokens([size]) - real) <= max(1, real // 50), size
    several = sizes[:3]
    assert abs(processor.count_tokens(several) - made(processor, several)) <= len(several)
    if is_rounded:
        assert processor.count_tokens([(20, 36)]) == processor.count_tokens([(32, 64)])
    assert processor.count_tokens([]) == 0


def test_a_formula_that_is_wrong_is_not_used(monkeypatch):
    processor = native("qwen2_vl")
    right = [processor.count_tokens([size]) for size in SIZES]
    other = native("qwen2_vl")
    monkeypatch.setattr(
        type(other.processor), "_get_num_multimodal_tokens",
        lambda self, image_sizes: {"num_image_tokens": [1000]}, raising=False,
    )  # fmt: skip
    found = [other.count_tokens([size]) for size in SIZES]
    assert max(found) < 1000
    assert sum(abs(a - b) for a, b in zip(found, right, strict=True)) <= sum(right)


def test_shapes_that_a_processor_refuses_count_nothing_and_huge_ones_are_not_made():
    processor = native("lfm2_vl")
    assert processor.count_tokens([(1, 3000)]) >= 0
    assert processor.count_tokens([(100_000, 100_000)]) >= 0


def test_counts_do_not_travel_to_workers():
    processor = native("llava")
    processor.count_tokens([(8, 8)])
    assert "_counts" not in vars(pickle.loads(pickle.dumps(processor)))


@pytest.mark.parametrize("mode", ["native", "square"])
def test_a_transform_counts_what_its_samples_have(mode, tmp_path):
    write_family(tmp_path, "llava")
    transform = ImageTextToText(str(tmp_path), image_inputs=mode).transform(True)
    conversation, images = SAMPLES["two"]
    with_images = transform(images, conversation, 0).input_ids
    text = dialogue("which is older?", "two")
    alone = transform(None, text, 0).input_ids
    counted = transform.image_tokens([tuple(image.shape[1:]) for image in images])
    # LLaVA's template writes a line break behind each image.
    assert len(with_images) - len(alone) == counted + 2
    assert transform.tokens_per_image == (counted // 2 if mode == "square" else None)
