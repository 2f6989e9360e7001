"""Contrastive losses of many-to-many pairs, against loops and open_clip's own losses."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn.functional import normalize

from mmcl.models.open_clip.clip_losses import clip_loss, siglip_loss

SCALE, BIAS = torch.tensor(7.0), torch.tensor(-3.0)
TEXTS = torch.tensor([10, 11, 12, 10, 13, 14])
IMAGES = torch.tensor([1, 1, 2, 3, 2, -1])


def pairs(count=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    image, text = (normalize(torch.randn(count, 4, generator=draw), dim=1) for _ in range(2))
    return image, text


def matches(texts, images):
    """Which samples are positives of which, by comparing each with each."""
    count = range(len(texts))
    same = [[texts[i] == texts[j] or images[i] == images[j] >= 0 for j in count] for i in count]
    return [[bool(one) for one in row] for row in same]


def clip_by_loops(image, text, positive):
    total = 0.0
    for queries, gallery in ((image, text), (text, image)):
        for i, query in enumerate(queries):
            scores = [7.0 * float(query @ each) for each in gallery]
            norm = math.log(sum(math.exp(score) for score in scores))
            own = [scores[j] - norm for j in range(len(scores)) if positive[i][j]]
            total -= sum(own) / len(own)
    return total / (2 * len(image))


def siglip_by_loops(image, text, positive):
    total = 0.0
    for i, query in enumerate(image):
        for j, each in enumerate(text):
            logit = 7.0 * float(query @ each) - 3.0
            total += math.log1p(math.exp(-logit if positive[i][j] else logit))
    return total / len(image)


def test_the_loss_of_many_to_many_pairs_equals_loops():
    image, text = pairs()
    positive = matches(TEXTS, IMAGES)
    assert sum(map(sum, positive)) == 12
    own = clip_loss(image, text, SCALE, text_ids=TEXTS, image_ids=IMAGES)
    assert own.item() == pytest.approx(clip_by_loops(image, text, positive), rel=1e-5)
    own = siglip_loss(image, text, SCALE, BIAS, text_ids=TEXTS, image_ids=IMAGES)
    assert own.item() == pytest.approx(siglip_by_loops(image, text, positive), rel=1e-5)


def test_pairs_of_distinct_images_and_texts_have_open_clips_losses():
    image, text = pairs()
    ids = {"text_ids": torch.arange(6), "image_ids": torch.arange(20, 26)}
    torch.testing.assert_close(clip_loss(image, text, SCALE, **ids), ClipLoss()(image, text, SCALE))
    own = siglip_loss(image, text, SCALE, BIAS, **ids)
    torch.testing.assert_close(own, SigLipLoss()(image, text, SCALE, BIAS))


def test_image_ids_of_distinct_images_change_no_bit():
    image, text = pairs()
    for ids in (torch.arange(6), torch.full((6,), -1)):
        without = clip_loss(image, text, SCALE, text_ids=TEXTS)
        assert torch.equal(clip_loss(image, text, SCALE, text_ids=TEXTS, image_ids=ids), without)
        without = siglip_loss(image, text, SCALE, BIAS, text_ids=TEXTS)
        own = siglip_loss(image, text, SCALE, BIAS, text_ids=TEXTS, image_ids=ids)
        assert torch.equal(own, without)


def test_another_caption_of_the_same_image_is_not_pushed_away():
    image = normalize(torch.tensor([[1.0, 0.2], [1.0, 0.2]]), dim=1)
    text = normalize(torch.tensor([[1.0, 0.1], [1.0, -0.3]]), dim=1).requires_grad_()
    for shown, is_pulled in ((torch.tensor([5, 5]), True), (None, False)):
        loss = siglip_loss(image, text, SCALE, BIAS, text_ids=torch.arange(2), image_ids=shown)
        (gradient,) = torch.autograd.grad(loss, text)
        # A step against the gradient brings the caption nearer to the image, or away from it.
        assert bool((gradient[1] @ image[0] < 0).item()) == is_pulled


def test_two_captions_of_one_image_solved_by_hand():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    shown = torch.tensor([4, 4])
    loss = clip_loss(image, text, torch.tensor(1.0), text_ids=torch.arange(2), image_ids=shown)
    by_image = math.log(math.e + 1) - 0.5  # scores 1 and 0, half of the target on each
    by_text = math.log(2)  # both images are alike
    assert loss.item() == pytest.approx((by_image + by_text) / 2, abs=1e-6)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_samples_outside_of_the_loss_are_as_if_they_were_not_there(loss):
    image, text = pairs()
    more = () if loss is clip_loss else (BIAS,)
    kept = torch.tensor([True, False, True, True, False, True])
    masked = loss(image, text, SCALE, *more, text_ids=TEXTS, image_ids=IMAGES, in_loss=kept)
    ids = {"text_ids": TEXTS[kept], "image_ids": IMAGES[kept]}
    assert torch.equal(masked, loss(image[kept], text[kept], SCALE, *more, **ids))
    none = torch.zeros(6, dtype=torch.bool)
    assert loss(image, text, SCALE, *more, text_ids=TEXTS, in_loss=none).item() == 0
