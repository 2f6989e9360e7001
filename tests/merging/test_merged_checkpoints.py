"""Merging of checkpoints: products B A of adapters, exports that load again, and refusals."""

import json

import open_clip
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmcl.core import begin_task
from mmcl.core.model import without_adapters
from mmcl.lightning.module import ContinualModule
from mmcl.merging.checkpoints import FROM_BASE, load_weights, merge_weights, write_merged
from mmcl.models import ImageTextToText, OpenCLIP
from mmcl.ops.model_merging import ties
from mmcl.strategies import L2P, LoRA, MoELoRA
from mmcl.strategies.finetune import Finetune
from tests.cli.cli_fixtures import write_chat
from tests.models.small_resnet import a_resnet_clip
from tests.toys.toy_clip import a_task
from tests.toys.toy_llava import an_answer_task


@pytest.fixture
def chat(tmp_path):
    return write_chat(tmp_path / "chat")


def noisy(module, seed, task=None):
    """A module whose trainable weights moved."""
    begin_task(module.model, module.strategy, task or an_answer_task(0))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    return module.eval()


def llava(chat, seed, strategy=None):
    return noisy(ContinualModule(ImageTextToText(str(chat)), strategy or LoRA(rank=2)), seed)


def clip(seed, strategy=None):
    model = OpenCLIP(model="tiny", pretrained="built-in")
    return noisy(ContinualModule(model, strategy or Finetune()), seed, a_task(0))


def products(module):
    """Weight name -> scale * B A, by hand."""
    found = {}
    for name, layer in module.model.lm.named_modules():
        if isinstance(layer, LoraLayer):
            (key,) = layer.lora_A
            product = layer.lora_B[key].weight @ layer.lora_A[key].weight
            found[without_adapters(f"{name}.base_layer.weight")] = layer.scaling[key] * product
    return found


def test_adapters_are_merged_on_their_products(chat, tmp_path):
    one, two = llava(chat, 1), llava(chat, 2)
    pair = [load_weights(one, "one"), load_weights(two, "two")]
    merged = merge_weights("average", pair, None, {"shares": [0.25, 0.75]})
    base = AutoModelForImageTextToText.from_pretrained(chat).state_dict()
    first, second = products(one), products(two)
    assert first
    for name, tensor in merged.items():
        expected = base[name]
        if name in first:
            expected = expected + 0.25 * first[name] + 0.75 * second[name]
        torch.testing.assert_close(tensor, expected.detach(), rtol=1e-5, atol=1e-6)
    write_merged(one, merged, tmp_path / "out", {"method": "average"})
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in merged.items())
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == {"method": "average"}


def test_task_vectors_of_a_clip_are_added_to_the_base_and_open_clip_loads_them(tmp_path):
    base = load_weights(ContinualModule(OpenCLIP(model="tiny", pretrained="built-in")), "base")
    one, two = clip(1), clip(2)
    pair = [load_weights(one, "one"), load_weights(two, "two")]
    merged = merge_weights("task_arithmetic", pair, base, {"scale": 0.5})
    for name, tensor in base.weights.items():
        expected = 0.5 * (pair[0].weights[name] + pair[1].weights[name]).double()
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-4, atol=1e-5)
        assert tensor.shape == merged[name].shape
    write_merged(one, merged, tmp_path / "out", {})
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}")
    assert all(torch.equal(tensor, merged[n]) for n, tensor in model.state_dict().items())
    write_merged(one, merged, tmp_path / "one.safetensors", {})
    assert (tmp_path / "one.merge.json").is_file()
    assert load_file(tmp_path / "one.safetensors").keys() == merged.keys()


def test_models_of_other_shapes_and_adapters_of_another_base_are_refused(chat):
    pair = [load_weights(clip(1), "one"), load_weights(llava(chat, 1), "two")]
    with pytest.raises(ValueError, match=r"one \(1\) and two \(2\): '.*' is in set"):
        merge_weights("average", pair, None, {})
    other = ContinualModule(ImageTextToText(str(chat)), LoRA(rank=2))
    with torch.no_grad():
        next(other.model.lm.parameters()).add_(1.0)
    pair = [load_weights(llava(chat, 1), "one"), load_weights(noisy(other, 1), "two")]
    with pytest.raises(ValueError, match="adapters of one and two .*adapters of one base"):
        merge_weights("average", pair, None, {})


def test_predictions_with_more_than_weights_are_refused(chat):
    with pytest.raises(ValueError, match="one routes every sample.*would lose"):
        load_weights(llava(chat, 1, MoELoRA(rank=2)), "one")
    with pytest.raises(ValueError, match="two has more than weights .L2P.*would lose"):
        load_weights(clip(1, L2P()), "two")


def test_a_line_has_two_ends():
    one = load_weights(clip(1), "one")
    with pytest.raises(ValueError, match="got 3: give two"):
        merge_weights("wise", [one] * 3, None, {"alpha": 0.5})


def resnet(folder, seed, variance, batches):
    """Plain weights of a small ResNet CLIP that moved, with this variance in every BatchNorm."""
    module = noisy(ContinualModule(a_resnet_clip(folder), Finetune()), seed, a_task(0))
    for name, buffer in module.model.clip.named_buffers():
        if name.endswith("running_var"):
            buffer.fill_(variance)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(batches)
    return module, load_weights(module, f"seed {seed}")


@pytest.mark.parametrize(
    ("method", "arguments", "variance", "batches"),
    [
        ("average", {"shares": [3, 1]}, 0.75 * 0.2 + 0.25 * 0.4, 12),
        ("ema", {"share": 0.25}, 0.75 * 0.2 + 0.25 * 0.4, 12),
        ("wise", {"alpha": 0.75}, 0.25 * 0.2 + 0.75 * 0.4, 18),
        ("task_arithmetic", {"scale": 2.0}, 0.3, 15),
        ("ties", {"density": 1.0}, 0.3, 15),
        ("dare", {"drop_rate": 0.5}, 0.3, 15),
        ("magmax", {"scale": 3.0}, 0.3, 15),
    ],
)
def test_batch_statistics_are_averaged_and_no_variance_is_negative(
    tmp_path, method, arguments, variance, batches
):
    base = resnet(tmp_path, 0, 1.0, 3)[1] if method in FROM_BASE else None
    module, one = resnet(tmp_path, 1, 0.2, 10)
    _, two = resnet(tmp_path, 2, 0.4, 20)
    merged = merge_weights(method, [one, two], base, arguments)
    assert list(merged) == list(one.weights)
    seen = 0
    for name, tensor in merged.items():
        if name.endswith("running_var"):
            torch.testing.assert_close(tensor, torch.full_like(tensor, variance))
            seen += 1
        elif name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64
            assert int(tensor) == batches
    assert seen > 3
    module.model.clip.load_state_dict(merged)


def test_buffers_take_no_part_in_the_fraction_that_ties_keeps(tmp_path):
    base, one, two = (resnet(tmp_path, seed, 10.0**seed, 1)[1] for seed in (0, 1, 2))
    merged = merge_weights("ties", [one, two], base, {"density": 0.1})
    weights = [
        {n: t for n, t in each.weights.items() if "running" not in n and "tracked" not in n}
        for each in (base, one, two)
    ]
    expected = ties(weights[0], weights[1:], density=0.1)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(merged[name], tensor)
