"""Keys in any wrapping find their place in the model; what has none is named."""

import json
import re
import warnings

import open_clip
import pytest
import torch
from torch.nn import functional

from mmcl.models import OpenCLIP
from mmcl.models.open_clip.checkpoint_files import NamedTensor
from mmcl.models.open_clip.checkpoint_keys import architectures_of, load_weights
from tests.models.small_clip import SMALL, write_small
from tests.models.test_clip_loading import same_weights

CUSTOM = {**SMALL, "custom_text": True}


@pytest.fixture
def native():
    torch.manual_seed(3)
    return open_clip.model.CLIP(**SMALL)


def custom(config=SMALL):
    return open_clip.model.CustomTextCLIP(**config)


@pytest.fixture
def load(tmp_path):
    """Save content, load it into a new model and return the model."""

    def load(content, config=SMALL, is_custom=False):
        torch.save(content, tmp_path / "w.pt")
        clip = custom(config) if is_custom else open_clip.model.CLIP(**config)
        load_weights(clip, tmp_path / "w.pt", "small-clip")
        return clip

    return load


def equal(one, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


PREFIXES = [
    "", "module.", "_orig_mod.", "model.", "clip.", "net.", "module._orig_mod.",
    "_orig_mod.module.",
    "model.clip.", "model.module.", "module.model._orig_mod.", "pl_module.net.clip_model.",
    "_fsdp_wrapped_module.", "backbone.", "clip_model.model.module.", "model.model.clip.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "container", [(), ("state_dict",), ("model",), ("model_state_dict",), ("module",), ("network",),
                  ("checkpoint", "model"), ("net", "state_dict")],
)  # fmt: skip
def test_weights_in_any_prefix_and_any_container_are_found(native, load, prefix, container):
    content = {f"{prefix}{key}": value for key, value in native.state_dict().items()}
    for name in container:
        content = {"epoch": 1, name: content, "optimizer": {"state": {0: {"step": torch.ones(())}}}}
    assert equal(native, load(content))


def test_wrappers_within_keys_are_dropped(native, load):
    content = {}
    for key, value in native.state_dict().items():
        inner = re.sub(r"^visual\.", "visual._orig_mod.", key)
        inner = re.sub(r"resblocks\.(\d)\.", r"resblocks.\1._checkpoint_wrapped_module.", inner)
        content[f"module.{inner}"] = value
    assert equal(native, load(content))


def test_prefixes_that_differ_between_towers_are_found(native, load):
    content = {
        f"{'vision.' if key.startswith('visual.') else 'language.'}{key}": value
        for key, value in native.state_dict().items()
    }
    assert equal(native, load(content))


def test_a_text_tower_of_its_own_and_a_plain_one_load_into_each_other(native, load):
    separate = custom()
    keys = separate.state_dict()
    renamed = {k if k in keys else f"text.{k}": v for k, v in native.state_dict().items()}
    assert equal(native, load({"state_dict": {f"module.{k}": v for k, v in renamed.items()}}))
    separate.load_state_dict(renamed)
    content = {f"module.{k}": v for k, v in native.state_dict().items()}
    assert equal(separate, load(content, is_custom=True))


def test_half_precision_becomes_single_precision(native, load):
    content = {key: value.half() for key, value in native.state_dict().items()}
    clip = load(content)
    for name, value in clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, content[name].float())


def test_a_lightning_checkpoint_of_a_wrapped_clip_is_loaded(native, load):
    content = {f"model.clip.{key}": value for key, value in native.state_dict().items()}
    assert equal(native, load({"state_dict": content, "loops": {}, "hyper_parameters": {"lr": 1}}))


def test_a_checkpoint_of_a_whole_mmcl_model_is_loaded(tmp_path):
    config = str(write_small(tmp_path))
    trained = OpenCLIP(config, seed=1)
    state = {f"model.{name}": value for name, value in trained.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "task_00.ckpt")
    loaded = OpenCLIP(config, pretrained=str(tmp_path / "task_00.ckpt"), seed=2)
    assert same_weights(loaded, trained.clip)


def test_a_checkpoint_of_trained_weights_alone_names_what_is_missing(native, load):
    trained = {k: v for k, v in native.state_dict().items() if not k.startswith("transformer")}
    with pytest.raises(RuntimeError, match=r"24 missing \(transformer\.resblocks\.0.*mmcl export"):
        load({"state_dict": {f"model.clip.{k}": v for k, v in trained.items()}})


def test_the_average_alone_is_loaded_and_said(native, load):
    with pytest.warns(UserWarning, match="averaged weights"):
        assert equal(native, load({"state_dict_ema": native.state_dict()}))


@pytest.mark.parametrize("name", ["state_dict_ema", "ema", "model_ema"])
def test_the_average_beside_the_weights_is_said_and_not_loaded(native, load, name):
    average = {key: torch.zeros_like(value) for key, value in native.state_dict().items()}
    with pytest.warns(UserWarning, match=rf"holds averaged weights \(EMA\) under '{name}'"):
        assert equal(native, load({name: average, "state_dict": native.state_dict()}))


def test_two_sets_of_weights_are_ambiguous(native, load):
    content = {
        f"{who}.{key}": value for who in ("student", "teacher")
        for key, value in native.state_dict().items()
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="two sets of these weights, under 'student' and 'teach"):
        load(content)


def test_constant_buffers_of_other_versions_are_silent(native, load):
    content = {
        **native.state_dict(),
        "attn_mask": native.attn_mask,
        "visual.position_ids": torch.arange(5)[None],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(native, load(content))


def test_another_mask_than_the_models_is_refused(native, load):
    with pytest.raises(RuntimeError, match=r"1 unexpected \(attn_mask\)"):
        load({**native.state_dict(), "attn_mask": torch.zeros(77, 77)})


def test_a_head_beside_the_clip_is_left_out_by_name(native, load):
    content = {f"model.clip.{k}": v for k, v in native.state_dict().items()}
    content |= {"model.head.weight": torch.zeros(3, 24), "model.head.bias": torch.zeros(3)}
    with pytest.warns(UserWarning, match=r"2 without a place .* left out \(.*model\.head\.weight"):
        assert equal(native, load({"state_dict": content}))


def test_keys_within_the_towers_that_the_model_lacks_are_refused(native, load):
    content = {**native.state_dict(), "visual.ls.gamma": torch.ones(2)}
    with pytest.raises(RuntimeError, match=r"1 unexpected \(visual\.ls\.gamma\)"):
        load(content)


def test_missing_keys_are_counted_and_the_first_five_named(native, load):
    content = {k: v for k, v in native.state_dict().items() if "visual.ln" not in k}
    with pytest.raises(
        RuntimeError, match=r"which has 62 keys: 4 missing \(visual\.ln_pre\.weight, .*\)"
    ):
        load(content)


def test_a_logit_bias_of_sigmoid_training_becomes_the_models(native, load):
    bias = torch.tensor(-9.5)
    clip = load({**native.state_dict(), "logit_bias": bias})
    assert torch.equal(clip.logit_bias, bias)
    assert isinstance(clip.logit_bias, torch.nn.Parameter)


def test_a_logit_bias_that_the_weights_lack_starts_at_zero_and_is_said(native, load):
    with pytest.warns(UserWarning, match="has no logit_bias, which starts at 0"):
        clip = load(native.state_dict(), {**SMALL, "init_logit_bias": -10})
    assert clip.logit_bias.item() == 0


def test_a_logit_scale_of_one_dimension_is_loaded(native, load):
    content = {**native.state_dict(), "logit_scale": torch.tensor([3.5])}
    assert load(content).logit_scale.item() == 3.5


def test_another_image_size_interpolates_positions_as_open_clip_and_says_so(native, load):
    config = json.loads(json.dumps(SMALL))
    config["vision_cfg"]["image_size"] = 64
    with pytest.warns(UserWarning, match=r"visual\.positional_embedding is interpolated from"):
        clip = load(native.state_dict(), config)
    old = native.visual.positional_embedding.detach()
    grid = old[1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True)
    expected = torch.cat([old[:1], grid.flatten(2)[0].T])
    torch.testing.assert_close(clip.visual.positional_embedding.detach(), expected)


def test_another_context_length_interpolates_and_says_so(native, load):
    config = json.loads(json.dumps(SMALL))
    config["text_cfg"]["context_length"] = 20
    with pytest.warns(UserWarning, match=r"positional_embedding is interpolated from \(77, 16\)"):
        clip = load({k: v.half() for k, v in native.state_dict().items()}, config)
    old = native.positional_embedding.detach().half().float()
    expected = functional.interpolate(old.T[None], size=20, mode="linear")[0].T
    torch.testing.assert_close(clip.positional_embedding.detach(), expected)


def test_positions_of_a_timm_tower_are_interpolated(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    text = {**SMALL["text_cfg"], "vocab_size": 20}
    config = {"embed_dim": 24, "vision_cfg": {**vision, "image_size": 160}, "text_cfg": text}
    one = open_clip.model.CLIP(**config)
    state = one.state_dict()
    name = "visual.trunk.pos_embed"
    extra = one.visual.trunk.num_prefix_tokens
    grid = torch.ones(1, 25, state[name].shape[2])
    state[name] = torch.cat([torch.zeros(1, extra, grid.shape[2]), grid], 1)
    torch.save(state, tmp_path / "w.pt")
    two = open_clip.model.CLIP(**config)
    with pytest.warns(UserWarning, match=r"visual\.trunk\.pos_embed is interpolated"):
        load_weights(two, tmp_path / "w.pt", "timm")
    positions = two.visual.trunk.pos_embed.detach()
    torch.testing.assert_close(positions[:, extra:], torch.ones_like(positions[:, extra:]))
    assert positions[:, :extra].abs().max() == 0


def test_a_position_embedding_that_claims_more_than_the_file_holds_is_refused(native, load):
    content = native.state_dict()
    content["positional_embedding"] = torch.zeros(1, 1).expand(10**9, 16)
    with pytest.raises(RuntimeError, match="claims the shape"):
        load(content)


def test_a_resnet_of_another_image_size_is_refused_with_its_shapes(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    small = {**SMALL, "vision_cfg": vision}
    torch.save(open_clip.model.CLIP(**small).state_dict(), tmp_path / "w.pt")
    other = open_clip.model.CLIP(**{**small, "vision_cfg": {**vision, "image_size": 96}})
    with pytest.raises(
        RuntimeError,
        match=r"1 of another shape \(visual\.attnpool\.positional_embedding \(5, 256\)",
    ):
        load_weights(other, tmp_path / "w.pt", "small-resnet")


def test_old_checkpoints_without_batch_counters_load(tmp_path):
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    one, two = (open_clip.model.CLIP(**{**SMALL, "vision_cfg": vision}) for _ in range(2))
    state = {k: v for k, v in one.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    load_weights(two, tmp_path / "w.pt", "small-resnet")
    assert equal(one, two)


def empty_state(name):
    """The state of an architecture of open_clip, without memory."""
    config = open_clip.get_model_config(name)
    config.pop("custom_text", None)
    with torch.device("meta"):
        return open_clip.model.CLIP(**config).state_dict()


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "RN50", "ViT-B-16-plus-240"])
def test_the_architecture_of_weights_is_found_by_their_shapes(name):
    tensors = [NamedTensor("state_dict", k, v) for k, v in empty_state(name).items()]
    assert name in architectures_of(tensors)
    assert "ViT-H-14" not in architectures_of(tensors)


def test_weights_of_a_known_architecture_are_named_in_the_error(load):
    zeros = {k: torch.zeros(()).expand(v.shape) for k, v in empty_state("ViT-L-14").items()}
    with pytest.raises(RuntimeError, match=r"61 of another.*weights are of ViT-L-14 or"):
        load({"state_dict": {f"module.{k}": v for k, v in zeros.items()}})


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("text_model.encoder.layer.0.attention.self.query.weight", "ChineseCLIPModel"),
        ("text_model.roberta.embeddings.word_embeddings.weight", "AltCLIPModel"),
        ("module.bert.encoder.layer.0.output.dense.weight", "cn_clip"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "ImageTextToText"),
        ("visual_encoder.blocks.0.attn.qkv.weight", "BLIP"),
        ("base_model.model.visual.proj.lora_A.default.weight", "LoRA"),
        ("blocks.0.attn.qkv.weight", "vision transformer of timm"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "one tower of a model of transformers"),
        ("something.weight", r"Its keys \(model\.something\.weight, \.\.\.\) are of no form"),
    ],
)
def test_foreign_weights_are_recognized_by_their_keys(load, key, form):
    with pytest.raises(RuntimeError, match=rf"62 missing.*{form}"):
        load({"model": {key: torch.zeros(2, 2)}})


def test_an_image_tower_alone_says_so(native, load):
    with pytest.raises(RuntimeError, match="image tower alone"):
        load(native.visual.state_dict())
    with pytest.raises(RuntimeError, match="image tower alone"):
        load({"state_dict": {f"visual.{k}": v for k, v in native.visual.state_dict().items()}})


def test_an_empty_checkpoint_says_so(load):
    with pytest.raises(RuntimeError, match="holds no tensors"):
        load({"epoch": 3})


def test_mobile_clip_keys_go_through_open_clips_conversion(native, load, monkeypatch):
    key = "image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight"
    seen = []

    def convert(model, state):
        seen.append(set(state))
        return native.state_dict()

    monkeypatch.setattr("mmcl.models.open_clip.checkpoint_keys.convert_state_dict", convert)
    clip = load(
        {"state_dict": {f"module.{key}": torch.zeros(1), "module.logit_scale": torch.ones(())}}
    )
    assert equal(native, clip)
    assert seen == [{key, "logit_scale"}]
