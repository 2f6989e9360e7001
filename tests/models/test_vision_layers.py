"""The vision tower up to the layer that the model reads, beside the whole tower."""

import copy

import pytest
import torch
import transformers as hf

from mmcl.models import ImageTextToText
from mmcl.models.hf_vlm.architectures import architecture_of
from mmcl.models.hf_vlm.vision_layers import UsedLayers
from tests.models import hf_reference
from tests.models.small_families import write_family
from tests.models.test_candidate_scoring import sharpened
from tests.toys.toy_llava import a_llava

SEEN = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "num_hidden_layers": 4, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 32,
}  # fmt: skip


@pytest.fixture
def model():
    return sharpened(a_llava(seed=3, num_layers=2))


def whole(model):
    """A copy whose tower runs all layers."""
    twin = copy.deepcopy(model)
    twin.image_inputs.used_layers._is_proven = False
    return twin


def calls(layers):
    """Numbers of the layers that run."""
    seen = []
    for number, layer in enumerate(layers):
        # As transformers' own, which are no sign of a reader.
        hook = lambda module, given, out, number=number: seen.append(number)  # noqa: E731
        hook.__module__ = "transformers.hooks"
        layer.register_forward_hook(hook)
    return seen


def a_whole_llava(selected):
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SEEN), text_config=hf.LlamaConfig(**TEXT),
        image_token_index=31, vision_feature_layer=selected,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("selected", "argument", "run"),
    [
        (-2, 3, [0, 1, 2]),
        (-4, 1, [0]),
        (2, 2, [0, 1]),
        ([-3, 1], [2, 1], [0, 1]),
        (-1, None, [0, 1, 2, 3]),
        ([-2, -1], None, [0, 1, 2, 3]),
        (-5, None, [0, 1, 2, 3]),  # the input of the first layer: nothing would be left
    ],
)
def test_features_have_the_same_bits_with_the_layers_that_are_read(selected, argument, run):
    lm = a_whole_llava(selected)
    pixels = torch.randn(3, 3, 16, 16)
    expected = lm.model.get_image_features(pixels).pooler_output
    used = UsedLayers(lm, architecture_of(lm))
    more = used.arguments(lm, {"pixel_values": pixels})
    assert more == ({} if argument is None else {"vision_feature_layer": argument})
    seen = calls(lm.model.vision_tower.encoder.layers)
    with used.only(lm):
        found = lm.model.get_image_features(pixels, **more).pooler_output
    assert seen == run
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(lm.model.vision_tower.encoder.layers) == 4


def test_the_tower_has_all_layers_after_an_error(model):
    batch = hf_reference.a_batch(model, (0, 1))
    model.image_inputs.forward_kwargs(model.lm, batch)
    names = list(model.state_dict())
    inside = []

    def fail():
        with model.image_inputs.used_layers.only(model.lm):
            inside.extend(model.state_dict())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(inside) < len(names)
    assert list(model.state_dict()) == names


def test_loss_and_gradients_have_the_same_bits_as_with_all_layers(model):
    model.lm.requires_grad_(True)
    twin = whole(model)
    batch = hf_reference.a_batch(model, (0, 1, 2))
    for one in (model, twin):
        one.train()
        one.loss(one(batch), batch).backward()
    assert model.image_inputs.used_layers._is_proven
    seen = 0
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert torch.equal(ours.grad, theirs.grad), name
        seen += int("vision_tower.encoder" in name and bool(ours.grad.any()))
    assert seen > 10


def test_answers_and_stored_features_are_those_with_all_layers(model):
    twin, batch = whole(model), hf_reference.a_batch(model, (0, 1, 2))
    assert model.generate(batch, max_new_tokens=6) == twin.generate(batch, max_new_tokens=6)
    assert torch.equal(model.encode_image(batch), twin.encode_image(batch))


def test_a_hook_in_an_unused_layer_sees_its_activations(model):
    batch, seen = hf_reference.a_batch(model, (0, 1)), []
    layer = model.lm.model.vision_tower.encoder.layers[-1]
    model(batch)
    layer.mlp.fc1.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    model(batch)
    assert seen == [2]


def test_a_model_that_reads_more_of_its_tower_runs_all_layers(model, monkeypatch):
    features = model.lm.model.get_image_features

    def with_summary(pixel_values, vision_feature_layer=-2):
        found = features(pixel_values, vision_feature_layer=vision_feature_layer)
        summary = found.last_hidden_state.mean()
        found.pooler_output = [image + summary for image in found.pooler_output]
        return found

    monkeypatch.setattr(model.lm.model, "get_image_features", with_summary)
    seen = calls(model.lm.model.vision_tower.encoder.layers)
    batch = hf_reference.a_batch(model, (0, 1))
    given = model.image_inputs.forward_kwargs(model.lm, batch)
    assert list(given) == ["pixel_values"]
    seen.clear()
    with model.image_inputs.used_layers.only(model.lm):
        model.lm.model.get_image_features(**given)
    assert seen == [0, 1]


def test_a_pooling_head_that_nobody_reads_does_not_run(tmp_path):
    model = ImageTextToText(str(write_family(tmp_path, "llava_onevision")), image_inputs="square")
    tower = model.lm.model.vision_tower
    twin, batch = whole(model), hf_reference.a_batch(model, (0, 1))
    model.image_inputs.forward_kwargs(model.lm, batch)
    seen = calls([tower.head])
    assert tower.use_head
    with torch.no_grad():
        assert torch.equal(model(batch).logits, twin(batch).logits)
    assert seen == []
    assert model.generate(batch, max_new_tokens=4) == twin.generate(batch, max_new_tokens=4)
    assert seen == []
    assert tower.use_head
