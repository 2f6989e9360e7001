"""Pairs that share images or texts across ranks: the losses and recalls of one process."""

import pytest
import torch
from torch.nn.functional import normalize

from mmcl.core import Batch, Output, Task
from mmcl.core.distributed import all_reduce_sum
from mmcl.evaluation.evaluators import EvalSpec, Evaluator
from mmcl.models.open_clip.clip_losses import clip_loss, siglip_loss
from mmcl.strategies import Finetune
from tests.distributed.test_exact_over_ranks import on_ranks

pytestmark = pytest.mark.slow
COUNT = 9
TEXTS = torch.tensor([10, 11, 12, 13, 10, 14, 15, 16, 17])
IMAGES = torch.tensor([1, 1, 2, 2, 3, 3, 1, -1, -1])
IN_LOSS = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)


def gradient(kind, rank=0, world=1):
    """Loss and gradient of the global batch, of which a rank has a stride."""
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(2, COUNT, 4, generator=draw).requires_grad_()
    own = slice(rank, COUNT, world)
    image, text = (normalize(each[own], dim=1) for each in whole)
    ids = {"text_ids": TEXTS[own], "image_ids": IMAGES[own], "in_loss": IN_LOSS[own]}
    if kind == "none on rank 1" and rank == 1:
        ids["image_ids"] = None
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    if kind == "siglip":
        loss = siglip_loss(image, text, scale, bias, **ids)
    else:
        loss = clip_loss(image, text, scale, **ids)
    loss = loss * IN_LOSS[own].sum() / IN_LOSS.sum()
    (found,) = torch.autograd.grad(loss, whole)
    return {"loss": all_reduce_sum(loss.detach()), "gradient": all_reduce_sum(found)}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_loss_of_shared_images_is_that_of_one_process(tmp_path, world, kind):
    found = on_ranks(lambda rank, world: gradient(kind, rank, world), tmp_path, world)
    alone = gradient(kind)
    assert alone["gradient"].abs().sum() > 0
    for each in found:
        torch.testing.assert_close(each, alone)


def test_a_rank_may_have_no_image_ids(tmp_path):
    found = on_ranks(lambda rank, world: gradient("none on rank 1", rank, world), tmp_path)
    assert all(torch.isfinite(each["loss"]) for each in found)


class Lookup(torch.nn.Module):
    """Embeds an image by its first pixels, a text by its tokens."""

    def forward(self, batch, prompts=None):
        image = batch.images[:, :, 0, :2].flatten(1).float() - 100
        text = batch.input_ids.float() - 100
        return Output(image @ text.T, image, text)


def recalls(rank=0, world=1):
    draw = torch.Generator().manual_seed(2)
    pictures = torch.randint(0, 200, (4, 3, 2, 2), generator=draw, dtype=torch.uint8)
    shown = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    texts = torch.randint(1, 200, (len(shown), 6), generator=draw)
    texts += 2 * pictures[shown][:, :, 0, :2].flatten(1).long() // 3
    texts[5] = texts[3]
    evaluator = Evaluator(EvalSpec(Task(0, "t", task_type="captioning"), ()))
    model = Lookup()
    evaluator.reset(model)
    # Pair 4 is bad and left out.
    for part in torch.arange(len(shown))[rank::world].split(2):
        kept = part[part != 4]
        none = torch.full((len(kept),), -100)
        batch = Batch(
            pictures[shown[kept]], none, torch.zeros(len(kept), dtype=torch.int64),
            input_ids=texts[kept], sample_ids=shown[kept], image_ids=shown[kept] + 7,
        )  # fmt: skip
        evaluator.update(model, Finetune(), batch)
    evaluator.compute()
    found = evaluator.retrieval
    numbers = [*found.image_to_text.values(), *found.text_to_image.values()]
    return torch.tensor([*numbers, found.images, found.texts, evaluator.value])


def test_recalls_are_those_of_one_process(tmp_path):
    alone = recalls()
    assert alone[6:8].tolist() == [4, 10]
    assert 0 < alone[-1] < 1
    for each in on_ranks(recalls, tmp_path):
        assert torch.equal(each, alone)
