"""Under autocast what follows the encoder is computed in float32: same choices, same scores."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mmcl.core import Batch, Output, begin_task, end_task, forward
from mmcl.models import OpenCLIP
from mmcl.ops.feature_quantization import encode, fit_centroids
from mmcl.ops.regularization import kd_loss
from mmcl.ops.routing import match_keys
from mmcl.strategies import L2P, NCM, CLMoE, HiDe, LoRARouter, ModalPrompt, RanPAC, RegLoRA
from tests.models.small_clip import write_small
from tests.strategies.generative_fixtures import TASKS, attached, mixed, taught
from tests.toys.toy_clip import StandIn, a_task
from tests.toys.toy_llava import dialogue_batches


def bf16():
    return torch.autocast("cpu", torch.bfloat16)


def crowded(count, dim=16, spread=0.02, seed=0):
    """Vectors around one direction, so that half precision confuses their neighbors."""
    draw = torch.Generator().manual_seed(seed)
    return torch.ones(dim) + spread * torch.randn(count, dim, generator=draw)


def test_half_precision_would_choose_other_keys_and_autocast_does_not():
    query, keys = crowded(64), crowded(10, seed=1)
    expected = []
    for one in query.double():
        cosines = [float(one @ key / one.norm() / key.norm()) for key in keys.double()]
        expected.append(sorted(range(10), key=lambda k: -cosines[k])[:3])
    with bf16():
        index, similarity = match_keys(query, keys, 3)
        rounded = functional.normalize(query, dim=1) @ functional.normalize(keys, dim=1).T
    assert index.tolist() == expected
    assert similarity.dtype == torch.float32
    wrong = (rounded.topk(3).indices != index).any(1).float().mean()
    assert wrong > 0.1  # or this test would prove nothing


def test_half_precision_keys_are_compared_in_float32():
    query, keys = crowded(64).bfloat16(), crowded(10, seed=1).bfloat16()
    index, similarity = match_keys(query, keys, 3)
    wide = match_keys(query.double(), keys.double(), 3)
    assert torch.equal(index, wide[0])
    torch.testing.assert_close(similarity.double(), wide[1], rtol=0, atol=1e-6)


def test_the_distillation_loss_of_half_precision_scores_is_that_of_their_values():
    draw = torch.Generator().manual_seed(0)
    teacher, student = (30 * torch.rand(6, 50, generator=draw).bfloat16() for _ in range(2))
    want = kd_loss(teacher.double(), student.double())
    with bf16():
        found = kd_loss(teacher, student)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


def test_centroids_and_codes_are_those_of_float32():
    vectors = crowded(600)
    plain = fit_centroids(vectors, 4, seed=0, rounds=3)
    with bf16():
        assert torch.equal(fit_centroids(vectors, 4, seed=0, rounds=3), plain)
        codes = encode(vectors, plain)
    expected = [
        [int((plain[part] - piece).double().norm(dim=1).argmin()) for part, piece in enumerate(row)]
        for row in vectors.view(-1, 4, 4)
    ]
    assert codes.tolist() == expected


def test_a_clip_scores_classes_in_float32(tmp_path):
    model = OpenCLIP(str(write_small(tmp_path))).eval()
    names = [f"{color} {thing}" for color in "abcdefgh" for thing in "stuvwxyz"]
    model.set_classes(names, ["a photo of a {}."])
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (16, 3, 32, 32), generator=draw, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(16, dtype=torch.int64), torch.zeros(16, dtype=torch.int64))
    with torch.no_grad(), bf16():
        output = model(batch)
        embedded = model.embed(batch, "image")
    assert output.logits.dtype == embedded.dtype == torch.float32
    scale = float(model.clip.logit_scale.exp())
    for image, scores in zip(output.image, output.logits, strict=True):
        expected = torch.stack([scale * (image.double() @ text.double()) for text in output.text])
        torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-4)
        assert len(set(scores.tolist())) > len(set(scores.bfloat16().tolist()))


@pytest.mark.parametrize("make", [NCM, lambda: RanPAC(100)], ids=["NCM", "RanPAC"])
def test_closed_form_scores_are_those_of_float32_on_the_same_embeddings(make):
    labels = torch.arange(120) % 6
    features = crowded(120) + 0.01 * torch.eye(6, 16)[labels]
    model, strategy = FixedEmbedding(features), make()
    strategy.attach(model)
    numbers = torch.arange(120)
    batch = Batch(
        torch.zeros(120, 3, 8, 8, dtype=torch.uint8), labels, torch.zeros_like(labels),
        sample_ids=numbers,
    )  # fmt: skip
    task = a_task(0, classes=6)
    begin_task(model, strategy, task)
    with bf16():
        end_task(model, strategy, task, [batch])
    plain = make()
    plain.attach(model)
    begin_task(model, plain, task)
    end_task(model, plain, task, [batch])
    expected = forward(model, plain, batch).logits
    with bf16():
        found = forward(model, strategy, batch).logits
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    half = expected.bfloat16().argmax(1)
    assert not torch.equal(half, expected.argmax(1))  # half-precision scores tie


class FixedEmbedding(StandIn):
    """Gives each sample its own embedding, and scores in half precision."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def embed(self, batch, modality):
        return self.features[batch.sample_ids]

    def forward(self, batch, prompts=None):
        return Output(torch.zeros(len(batch), 6, dtype=torch.bfloat16))


ROUTED = {
    "L2P": lambda: L2P("text", pool_size=10, prompt_length=1, top_k=3, seed=3),
    "ModalPrompt": lambda: ModalPrompt(prompt_length=2, top_k=1),
    "HiDe": lambda: HiDe(rank=2),
    "LoRARouter": lambda: LoRARouter(rank=2),
    "LoRARouter ridge": lambda: LoRARouter(rank=2, router="ridge"),
    "CLMoE": lambda: CLMoE(rank=2, num_experts=3),
}


@pytest.mark.parametrize("name", sorted(ROUTED))
def test_prompts_and_gates_are_those_of_float32_on_the_same_embeddings(name, monkeypatch):
    model, strategy = taught(*attached(ROUTED[name]), TASKS[:2])
    batch = mixed(model, 8)
    batch = replace(batch, task_ids=torch.full_like(batch.task_ids, -1))
    kept = {which: model.embed(batch, which) for which in ("image", "text")}
    monkeypatch.setattr(model, "embed", lambda batch, modality: kept[modality])
    plain = strategy.prompts(model, batch)
    with bf16():
        found = strategy.prompts(model, batch)
    for some in ("tokens", "aux", "gates"):
        expected = getattr(plain, some)
        assert getattr(found, some).keys() == expected.keys()
        for key, value in getattr(found, some).items():
            assert torch.equal(value, expected[key]), key
    assert plain.tokens or plain.gates


def test_the_marked_entries_and_merged_weights_of_an_adapter_are_those_of_float32():
    model, strategy = attached(lambda: RegLoRA(rank=2))
    begin_task(model, strategy, TASKS[0])
    layers = strategy.adapters.layers_of(model).values()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in layers:
            layer.adapter(0).lora_B.normal_(generator=draw)
    with bf16():
        end_task(model, strategy, TASKS[0], dialogue_batches(model, 0))
        merged = [layer.delta_weight([0]) for layer in layers]
    found = strategy.marks.tensors
    strategy.marks.take({})
    end_task(model, strategy, TASKS[0], dialogue_batches(model, 0))
    for name, bits in strategy.marks.tensors.items():
        assert torch.equal(found[name], bits), name
    for layer, delta in zip(layers, merged, strict=True):
        A, B = layer.adapter(0).lora_A, layer.adapter(0).lora_B
        torch.testing.assert_close(delta, layer.scale * (B @ A))
