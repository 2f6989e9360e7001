"""A CLIP with a logit bias is a SigLIP: sigmoid loss, scores with a bias, a scale without bound."""

import json
import math

import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from torch.nn import functional

from mmcl.core import Batch, Task, begin_task, step, trainable_parameters
from mmcl.export import write_clip
from mmcl.lightning.module import ContinualModule
from mmcl.models import OpenCLIP
from mmcl.strategies import Finetune
from tests.distributed.test_exact_over_ranks import gradient, on_ranks
from tests.models.small_clip import SMALL
from tests.models.test_text_towers import siglip

CAPTIONS = ["a red bird", "green ground", "a bird on a red ground", "on ! a"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sigmoid")
    config = {**SMALL, **siglip(folder / "text"), "init_logit_scale": math.log(117.0)}
    (folder / "small.json").write_text(json.dumps(config))
    return str(folder / "small.json")


@pytest.fixture
def model(architecture):
    return OpenCLIP(architecture, seed=2, train_logit_scale=True).eval()


def pairs(model, texts=CAPTIONS):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(texts), 3, 32, 32), dtype=torch.uint8, generator=draw)
    return Batch.from_texts(texts, images, tokenizer=model.tokenizer)


def theirs(model, batch):
    """Features, scale and bias as open_clip's own forward pass gives them."""
    tokens = model._tokenizer(CAPTIONS[: len(batch)])
    return model.clip(model._pixels(batch), tokens)


def test_scores_of_pairs_are_open_clips_own(model):
    batch = pairs(model)
    wanted, _ = model.clip.get_logits(model._pixels(batch), model._tokenizer(CAPTIONS))
    torch.testing.assert_close(model(batch).logits, wanted, atol=1e-4, rtol=1e-5)
    assert model.clip.logit_bias.item() == -10.0


def test_the_loss_of_distinct_pairs_is_open_clips_sigmoid_loss(model):
    batch = pairs(model)
    wanted = SigLipLoss()(*theirs(model, batch))
    loss = model.loss(model(batch), batch)
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for name in ("logit_scale", "logit_bias"):
        parameter = getattr(model.clip, name)
        ours, own = (
            torch.autograd.grad(each, parameter, retain_graph=True) for each in (loss, wanted)
        )
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-4)


def test_pairs_of_one_text_are_all_positive(model):
    batch = pairs(model, ["a bird", "red ground", "a bird"])
    output = model(batch)
    total = 0.0
    for row in range(3):
        for column in range(3):
            score = 117.0 * (output.image[row] @ output.text[column]).item() - 10.0
            sign = 1 if row == column or {row, column} == {0, 2} else -1
            total += math.log1p(math.exp(-sign * score))
    assert model.loss(output, batch).item() == pytest.approx(total / 3, rel=1e-4)


def test_a_scale_beyond_clips_bound_is_kept_and_clips_is_not(model):
    assert model._scale().item() == pytest.approx(117.0)
    clip = OpenCLIP("tiny")
    with torch.no_grad():
        clip.clip.logit_scale.fill_(math.log(117.0))
    assert clip._scale().item() == 100.0


def test_class_scores_have_the_bias_and_the_best_class_is_that_of_the_similarity(model):
    names = ["red bird", "green ground", "a"]
    model.set_classes(names, ["a {}"])
    batch = Batch.from_images(pairs(model).images, [0, 1, 2, 0])
    output = model(batch)
    unit = functional.normalize(model.clip.encode_text(model._tokenizer([f"a {n}" for n in names])))
    wanted = 117.0 * output.image @ unit.T - 10.0
    torch.testing.assert_close(output.logits, wanted, atol=1e-4, rtol=1e-4)
    assert model.generate(batch) == [names[best] for best in (output.image @ unit.T).argmax(1)]
    labels = functional.cross_entropy(wanted, batch.labels)
    torch.testing.assert_close(model.loss(output, batch), labels, atol=1e-4, rtol=1e-4)


def test_scale_and_bias_are_trained_together_or_not_at_all(architecture):
    for train in (False, True):
        model = OpenCLIP(architecture, train_logit_scale=train)
        trained = {name for name in trainable_parameters(model) if "logit" in name}
        assert trained == ({"clip.logit_scale", "clip.logit_bias"} if train else set())
        assert not any(name is model.clip.logit_bias for name in model.tower("text"))


def test_a_step_trains_scale_and_bias(model):
    strategy = Finetune()
    strategy.attach(model)
    begin_task(model, strategy, Task(0, "pairs", task_type="captioning"))
    optimizer = torch.optim.SGD([model.clip.logit_scale, model.clip.logit_bias], lr=0.1)
    before = model.clip.logit_bias.item(), model.clip.logit_scale.item()
    step(model, strategy, pairs(model)).loss.backward()
    optimizer.step()
    after = model.clip.logit_bias.item(), model.clip.logit_scale.item()
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_the_bias_is_in_state_fingerprint_and_export(architecture, tmp_path):
    model = OpenCLIP(architecture, seed=2)
    mark = model.fingerprint()
    with torch.no_grad():
        model.clip.logit_bias.fill_(-7.5)
    assert model.fingerprint() != mark
    module = ContinualModule(OpenCLIP(architecture, train_logit_scale=True))
    assert "model.clip.logit_bias" in module.trainable_state_dict()
    write_clip(ContinualModule(model), tmp_path / "out", half=False)
    again = OpenCLIP(str(tmp_path / "out"))
    assert again.clip.logit_bias.item() == -7.5
    assert again.fingerprint() == model.fingerprint()
    assert open_clip.create_model(f"local-dir:{tmp_path / 'out'}").logit_bias.item() == -7.5
    torch.testing.assert_close(again(pairs(again)).logits, model(pairs(model)).logits)


def test_an_architecture_with_siglip_in_its_name_may_have_clips_vocabulary(tmp_path):
    text = {**SMALL["text_cfg"], "no_causal_mask": True, "pool_type": "last", "context_length": 16}
    config = {**SMALL, "text_cfg": text, "custom_text": True, "init_logit_bias": -10.0}
    (tmp_path / "my-siglip.json").write_text(json.dumps(config))
    model = OpenCLIP(str(tmp_path / "my-siglip.json"))
    known = open_clip.tokenizer.SimpleTokenizer(context_length=16)
    assert torch.equal(model.tokenizer(CAPTIONS), known(CAPTIONS))
    torch.testing.assert_close(
        model.embed(Batch.from_texts(CAPTIONS, tokenizer=model.tokenizer), "text"),
        model.clip.encode_text(known(CAPTIONS), normalize=True).detach(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_gradient_on_several_processes_is_that_of_one(model, tmp_path, world):
    texts = [
        "a red bird",
        "green ground",
        "a bird",
        "a red bird",
        "on ! a",
        "ground",
        "red",
        "a bird",
    ]
    whole, task = pairs(model, texts), Task(0, "pairs", task_type="captioning")

    def work(rank=0, world=1):
        strategy = Finetune()
        strategy.attach(model)
        begin_task(model, strategy, task)
        return gradient(model, strategy, whole, world=world, rank=rank)

    wanted = work()
    for found in on_ranks(work, tmp_path, world):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-3)
