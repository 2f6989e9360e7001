import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mmcl.models import ImageTextToText, TinyLlava
from mmcl.models.open_clip.loading import load_clip
from mmcl.models.tiny_llava.vision_towers import convert_vit, vision_tower
from tests.toys.toy_llava import a_dialogue_batch, architecture

SMALL = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2}
KINDS = {
    "vit_tiny_patch16_224": "ViTModel",
    "deit_tiny_patch16_224": "ViTModel",
    "vit_base_patch16_clip_224": "CLIPVisionModel",
    "vit_base_patch16_clip_quickgelu_224": "CLIPVisionModel",
}


def shaken(module):
    """Random numbers in every weight, so that none is zero or one by chance."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    return module.eval()


def an_architecture(tmp_path, **vision):
    facts = json.loads(Path(architecture()).read_text())
    facts["vision_cfg"].update(vision)
    file = tmp_path / "other.json"
    file.write_text(json.dumps(facts))
    return str(file)


def outputs_of(blocks, run, image):
    """Output of every block."""
    seen = []
    hooks = [block.register_forward_hook(lambda m, i, out: seen.append(out)) for block in blocks]
    with torch.no_grad():
        run(image)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("is_quick", [False, True])
def test_hidden_states_are_those_of_open_clips_tower(is_quick, tmp_path):
    facts = json.loads(Path(architecture()).read_text())
    file = tmp_path / "tower.json"
    file.write_text(json.dumps({**facts, "quick_gelu": is_quick}))
    clip, _ = load_clip(str(file), None, 0)
    weights = tmp_path / "weights.safetensors"
    save_file(shaken(clip).state_dict(), str(weights))
    made = vision_tower(str(file), str(weights), 0)
    image = torch.randn(2, 3, 16, 16)
    theirs = outputs_of(clip.visual.transformer.resblocks, clip.encode_image, image)
    mine = made.tower(image, output_hidden_states=True).hidden_states
    assert len(mine) == len(theirs) + 1
    for own, other in zip(mine[1:], theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert made.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert (made.size, made.patch, made.patches) == (16, 8, 4)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_hidden_states_are_those_of_timms_vit(name, kind):
    vit = shaken(timm.create_model(name, **SMALL))
    tower, config = convert_vit(name, vit)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = outputs_of(vit.blocks, vit.forward_features, image)
        mine = tower(image, output_hidden_states=True).hidden_states
    assert type(tower).__name__ == kind
    assert (config.image_size, config.patch_size) == (32, 16)
    for own, other in zip(mine[1:], theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_base_patch16_siglip_224", SMALL, "other tokens in front of the patches"),
        ("vit_small_patch14_dinov2", {"img_size": 28, "depth": 1}, r"has 'blocks\.0\.ls1\.gamma'"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "depth": 1}, "other tokens in front"),
        ("test_resnet", {}, "is a ResNet"),
    ],
)
def test_other_architectures_of_timm_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"{message}.*use a ViT with a class token"):
        convert_vit(name, timm.create_model(name, **options))


def test_a_vit_that_computes_something_else_is_refused():
    vit = timm.create_model("vit_tiny_patch16_224", **SMALL)
    vit.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="has other hidden states after conversion"):
        convert_vit("changed", vit)


def test_a_llava_on_a_vit_of_timm_answers_and_is_saved(tmp_path):
    model = TinyLlava(
        "timm:test_vit", None, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=16
    ).eval()
    assert model.image_inputs.size == 160
    assert model.image_inputs.mean == pytest.approx([127.5] * 3)
    batch = a_dialogue_batch(model, 2)
    assert model.encode_image(batch).shape == (2, 100, 64)
    model.save(tmp_path)
    other = ImageTextToText(str(tmp_path))
    torch.testing.assert_close(other(batch).logits, model(batch).logits)


def test_timms_random_weights_come_from_the_seed():
    first, same, other = (vision_tower("timm:test_vit", None, seed).tower for seed in (1, 1, 2))
    names = ["layers.0.mlp.fc1.weight", "embeddings.patch_embeddings.projection.weight"]
    for name in names:
        assert torch.equal(first.state_dict()[name], same.state_dict()[name])
        assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_timms_weights_come_from_a_file(tmp_path):
    vit = shaken(timm.create_model("test_vit"))
    save_file(vit.state_dict(), str(tmp_path / "vit.safetensors"))
    tower = vision_tower("timm:test_vit", str(tmp_path / "vit.safetensors"), 0).tower
    fc1 = tower.state_dict()["layers.0.mlp.fc1.weight"]
    assert torch.equal(fc1, vit.blocks[0].mlp.fc1.weight)
    save_file({"cls_token": vit.cls_token.detach()}, str(tmp_path / "part.safetensors"))
    with pytest.raises(RuntimeError, match=r"lacks \d+ weights of 'test_vit' \(blocks"):
        vision_tower("timm:test_vit", str(tmp_path / "part.safetensors"), 0)


@pytest.mark.parametrize(
    ("tower", "weights", "message"),
    [
        ("timm:vit_teeny", None, "timm has no model 'vit_teeny': it has"),
        ("timm:test_vit", "built-in", "only 'tiny' ships with mmcl; give 'timm' for timm's own"),
        ("timm:test_vit", "no.pt", r"expected 'timm', null or a \.safetensors file"),
        ("ViT-B-16", "built-in", "only 'tiny' ships with mmcl"),
    ],
)
def test_other_towers_and_weights_are_refused(tower, weights, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        vision_tower(tower, weights, 0)


def test_timms_weights_without_a_network_name_a_way_out():
    with pytest.raises(RuntimeError, match=r"'timm:vit_tiny_patch16_224'.*give a \.safetensors"):
        vision_tower("timm:vit_tiny_patch16_224", "timm", 0)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8}, "is a ModifiedResNet, expected a plain ViT"),
        ({"ls_init_value": 0.1}, r"has 'ls_1\.gamma' in its layers"),
        ({"no_ln_pre": True}, r"has no 'pre_layrnorm"),
    ],
)
def test_towers_of_open_clip_that_differ_from_clips_are_refused(vision, message, tmp_path):
    with pytest.raises(ValueError, match=f"{message}.*timm:<name>"):
        vision_tower(an_architecture(tmp_path, **vision), None, 0)
