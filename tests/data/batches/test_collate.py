"""Collate functions of plain datasets: PIL images and tensors, labels and captions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mmcl
from mmcl import Batch, ImageCaptionCollate, ImageLabelCollate
from mmcl.models import OpenCLIP


def pixels(seed, size=(40, 30)):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *size), generator=g, dtype=torch.uint8)


def as_pil(image):
    return Image.fromarray(np.asarray(image.permute(1, 2, 0)))


@pytest.fixture(scope="module")
def model():
    return OpenCLIP("tiny", pretrained="built-in", seed=0)


def test_a_pil_image_and_its_tensors_give_the_same_batch(model):
    collate = ImageLabelCollate(model.transform(False), task=3)
    forms = [as_pil(pixels(1)), pixels(1), pixels(1).float() / 255]
    batch = collate([(form, 5) for form in forms])
    assert isinstance(batch, Batch)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images[0], batch.images[1])
    assert torch.equal(batch.images[0], batch.images[2])
    assert batch.labels.tolist() == [5, 5, 5]
    assert batch.task_ids.tolist() == [3, 3, 3]
    own = model.transform(False)(pixels(1), None, 0).image
    assert torch.equal(batch.images[0], own)


def test_a_loader_of_a_plain_dataset_trains_a_model(model):
    dataset = [(as_pil(pixels(n)), n % 2) for n in range(6)]
    loader = DataLoader(dataset, batch_size=3, collate_fn=ImageLabelCollate(model.transform(True)))
    model.set_classes(["owl", "jay"], ["a photo of a {}."])
    for batch in loader:
        loss = model.loss(model(batch), batch)
        assert torch.isfinite(loss)


def test_augmentation_follows_torchs_generator(model):
    collate = ImageLabelCollate(model.transform(True))
    torch.manual_seed(0)
    first = collate([(pixels(1), 0)])
    second = collate([(pixels(1), 0)])
    torch.manual_seed(0)
    again = collate([(pixels(1), 0)])
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, second.images)


def test_captions_are_tokenized_as_the_models_own(model):
    collate = ImageCaptionCollate(model.transform(False), task=1)
    batch = collate([(as_pil(pixels(1)), "a red square"), (pixels(2), "the digit three and more")])
    for row, text in enumerate(("a red square", "the digit three and more")):
        own = model.transform(False)(pixels(1), text, 0).input_ids
        assert batch.input_ids[row, : len(own)].tolist() == own.tolist()
        assert batch.attention_mask[row].sum() == len(own)
    assert torch.isfinite(model.loss(model(batch), batch))


def test_of_several_captions_each_is_drawn_sometimes(model):
    collate = ImageCaptionCollate(model.transform(False))
    torch.manual_seed(0)
    drawn = {
        tuple(collate([(pixels(1), ["one", "two", "three"])]).input_ids[0].tolist())
        for _ in range(40)
    }
    assert len(drawn) == 3


def test_a_sample_without_a_caption_and_a_model_without_words_are_refused(model):
    with pytest.raises(ValueError, match="an empty list of captions"):
        ImageCaptionCollate(model.transform(False))([(pixels(1), [])])

    class Wordless:
        def __call__(self, pixels, text, seed):
            return model.transform(False)(pixels, None, seed)

    with pytest.raises(ValueError, match="the transform gives no token ids: use model.transform"):
        ImageCaptionCollate(Wordless())([(pixels(1), "a word")])


def test_images_of_equal_pixels_are_the_same_image(model):
    collate = ImageCaptionCollate(model.transform(True))
    torch.manual_seed(0)
    batch = collate([(pixels(1), "one"), (as_pil(pixels(1)), "two"), (pixels(2), "three")])
    ids = batch.image_ids.tolist()
    assert ids[0] == ids[1] != ids[2]
    assert not torch.equal(batch.images[0], batch.images[1])  # augmentation changes no identity
    other = collate([(pixels(1), "four")])
    assert other.image_ids.tolist() == ids[:1]


def test_an_image_id_may_be_stated(model):
    collate = ImageCaptionCollate(model.transform(False))
    items = [(pixels(1), "one", 5), {"image": pixels(2), "caption": "two", "image_id": 5}]
    named = [(pixels(n), "one", "000000391895.jpg") for n in (1, 2)]
    assert collate(items).image_ids.tolist() == [5, 5]
    ids = collate([*named, (pixels(3), "x", np.int64(7))]).image_ids.tolist()
    assert ids[0] == ids[1] > 0
    assert ids[2] == 7
    for wrong in (-1, 2.5, True, b"x"):
        with pytest.raises(ValueError, match="an image_id is .*expected a whole number"):
            collate([(pixels(1), "one", wrong)])


def test_all_captions_of_an_image_are_pairs_where_that_is_wanted(model):
    collate = ImageCaptionCollate(model.transform(False), all_captions=True)
    batch = collate([(pixels(1), ["one", "two", "three"]), (pixels(2), "four")])
    assert len(batch) == 4
    ids = batch.image_ids.tolist()
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert torch.equal(batch.images[0], batch.images[2])
    own = [model.transform(False)(pixels(1), text, 0).input_ids for text in ("one", "three")]
    for row, tokens in zip((0, 2), own, strict=True):
        assert batch.input_ids[row, : len(tokens)].tolist() == tokens.tolist()


def test_resized_images_have_identities_as_well(model):
    small = [pixels(n, (16, 16)) for n in (1, 1, 2)]
    texts = ["one", ["two", "three"], "four"]
    batch = mmcl.collate_captions(list(zip(small, texts, strict=True)), tokenizer=model.tokenizer)
    ids = batch.image_ids.tolist()
    assert ids[0] == ids[1] != ids[2]
    stated = mmcl.collate_captions(
        [(small[0], "one", 3), (small[2], "two", 3)], tokenizer=model.tokenizer
    )
    assert stated.image_ids.tolist() == [3, 3]


def test_training_batches_refuse_a_pair_for_every_caption(model):
    collate = ImageCaptionCollate(model.transform(True), all_captions=True)
    dataset = [(pixels(n), ["one", "two"]) for n in range(4)]
    strategy = mmcl.strategies.Finetune()
    mmcl.begin_task(model, strategy, mmcl.Task(0, "t", task_type="captioning"))
    loader = mmcl.replay_loader(dataset, strategy, collate_fn=collate, batch_size=2)
    with pytest.raises(ValueError, match="all_captions=True, which makes several samples of one"):
        next(iter(loader))
